"""Every collective against numpy over drawn meshes, in lockstep and in random orders; rank dims; what cannot be run."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xllm_compiler.interp import run, run_interleaved_ranks, run_ranks, run_value
from xllm_compiler.ir import ops
from xllm_compiler.ir.core import Builder, Module
from xllm_compiler.ir.diag import IrError
from xllm_compiler.ir.groups import RankGroup, world_size
from xllm_compiler.ir.opdef import OPS
from xllm_compiler.ir.parser import parse_module
from xllm_compiler.ir.semantics import NP_DTYPE, Array
from xllm_compiler.ir.types import Tensor
from xllm_compiler.ir.verify import verify
from xllm_compiler.testing.corpus import entry
from xllm_compiler.testing.inputs import make

LAWS = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


# ------------------------------------------------------------------------------------------- numpy, written on its own


def all_reduce(xs: Array, kind: str) -> list[Array]:
    """`xs` [ranks, ..]: what each brings."""
    return [reduce({"sum": np.add, "max": np.maximum}[kind], xs)] * len(xs)


def all_gather(xs: Array, axis: int) -> list[Array]:
    shape = list(xs.shape[1:])
    shape[axis] *= len(xs)
    return [np.moveaxis(xs, 0, axis).reshape(shape)] * len(xs)


def reduce_scatter(xs: Array, axis: int, kind: str) -> list[Array]:
    whole = np.moveaxis(all_reduce(xs, kind)[0], axis, 0)
    each = len(whole) // len(xs)
    return [np.moveaxis(whole[r * each : (r + 1) * each], 0, axis) for r in range(len(xs))]


def all_to_all(xs: Array, split: int, concat: int) -> list[Array]:
    out = []
    for to in range(len(xs)):
        each = xs.shape[1 + split] // len(xs)
        got = np.take(xs, range(to * each, (to + 1) * each), axis=1 + split)
        out.append(all_gather(got, concat)[0])
    return out


def broadcast(xs: Array, root: int) -> list[Array]:
    return [xs[root]] * len(xs)


REFERENCE: dict[type[ops.Collective], Callable[..., list[Array]]] = {
    ops.AllReduceStart: all_reduce,
    ops.AllGatherStart: all_gather,
    ops.ReduceScatterStart: reduce_scatter,
    ops.AllToAllStart: all_to_all,
    ops.BroadcastStart: broadcast,
}


def test_every_collective_is_compared() -> None:
    assert set(REFERENCE) == {cls for cls in OPS.values() if issubclass(cls, ops.Collective)}


# -------------------------------------------------------------------------------------------------------------- meshes


@st.composite
def meshes(draw: st.DrawFn) -> tuple[RankGroup, list[list[int]]]:
    """A group, and who is in it with whom: ranks number the elements of an array, of which the group is some axes."""
    axes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))  # the last one is that of neighbours
    low = draw(st.integers(0, len(axes) - 1))
    high = draw(st.integers(low + 1, len(axes)))
    ids = np.arange(math.prod(axes)).reshape(axes)
    members = np.moveaxis(ids, range(low, high), range(len(axes) - (high - low), len(axes)))
    size = math.prod(axes[low:high])
    group = RankGroup(size, math.prod(axes[high:]))
    return group, members.reshape(-1, size).tolist()


@LAWS
@given(meshes(), st.data())
def test_collectives_are_what_numpy_says(mesh: tuple[RankGroup, list[list[int]]], data: st.DataObject) -> None:
    group, parts = mesh
    ranks = sum(map(len, parts))
    cls = data.draw(st.sampled_from(list(REFERENCE)))
    dtype = data.draw(st.sampled_from(("f32", "bf16", "f64", "i32")))
    rank = data.draw(st.integers(1, 3))
    axes = st.integers(0, rank - 1)
    shape = [data.draw(st.integers(0, 3)) for _ in range(rank)]
    attrs: dict[str, Any] = {}
    for attr in cls.SPEC.attrs:
        match attr.name:
            case "kind":
                attrs["kind"] = data.draw(st.sampled_from(("sum", "max")))
            case "axis" | "split" | "concat":
                attrs[attr.name] = data.draw(axes)
            case "root":
                attrs["root"] = data.draw(st.integers(0, group.size - 1))
    cut = {ops.ReduceScatterStart: "axis", ops.AllToAllStart: "split"}.get(cls)
    if cut is not None:
        shape[attrs[cut]] *= group.size

    module = Module("sched")
    module.groups["g"] = group
    func = module.add_func("f")
    b = Builder.at_end(func)
    start = b.create(cls, func.add_arg("x", Tensor(dtype, shape)), group="g", **attrs)
    func.set_returns([b.create(ops.Wait, start.result).result])
    verify(module)

    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    xs = [(8 * rng.standard_normal(shape)).astype(NP_DTYPE[dtype]) for _ in range(ranks)]
    want: list[Array] = [np.empty(0)] * ranks
    for members in parts:
        wide = np.stack([xs[m] for m in members])
        wide = wide.astype(np.float32) if dtype == "bf16" else wide
        for m, y in zip(members, REFERENCE[cls](wide, **attrs), strict=True):
            want[m] = y.astype(NP_DTYPE[dtype])
    inputs, params = [{"x": x} for x in xs], [{}] * ranks
    for got in (run_ranks(module, "f", inputs, params), run_interleaved_ranks(module, "f", inputs, params, seed=3)):
        for (y,), expected in zip(got, want, strict=True):
            assert y.dtype == expected.dtype
            np.testing.assert_array_equal(y, expected)


def test_groups_of_a_mesh_run_beside_each_other() -> None:
    """2 x 2 ranks and all four, in one module: what the corpus says, computed once by hand."""
    module = entry("written/mesh").module()
    made = make(module.func("mlp"), {"N": 6}, seed=1)
    (x, *_), (p, *_) = [i["x"] for i in made.inputs], made.params
    n = x / np.sqrt(np.mean(x * x, axis=1, keepdims=True) + 1e-6) * p["norm"]
    h = n @ p["up"].T
    y = x + (h / (1 + np.exp(-h))) @ p["down"].T
    for (got,) in run_ranks(module, "mlp", made.inputs, made.params, made.dims, precise=True):
        np.testing.assert_allclose(got, y, rtol=1e-5, atol=1e-6)

    made = make(module.func("experts"), {"N": 6}, seed=2)
    xs, p = np.stack([i["x"] for i in made.inputs]).astype(np.float64), made.params[0]
    assert len({x.tobytes() for x in xs}) == 4, "ranks must differ, or nothing is shown"
    got = run_ranks(module, "experts", made.inputs, made.params, made.dims, precise=True)
    for rank, (back, largest) in enumerate(got):
        columns = xs[rank].reshape(6, 4, 2)  # the e-th two columns visit expert e
        np.testing.assert_allclose(
            back, np.maximum(np.einsum("nei,eoi->neo", columns, p["experts"]), 0).reshape(6, 8), rtol=1e-6
        )
        np.testing.assert_allclose(largest, np.maximum(xs[2] * p["scale"][2], xs[3] * p["scale"][3]), rtol=1e-6)


def test_a_larger_world_repeats_the_mesh() -> None:
    module = parse_module(TEXT.format(group="size=2 stride=2"))
    inputs = [{"x": np.full(2, 10.0**r, np.float32)} for r in range(8)]
    got = [r[0][0] for r in run_ranks(module, "f", inputs, [{}] * 8)]
    assert got == [101, 1010, 101, 1010, 1010000, 10100000, 1010000, 10100000]
    with pytest.raises(IrError, match="the groups need 4 ranks, 6 are run"):
        run_ranks(module, "f", inputs[:6], [{}] * 6)


TEXT = """xir 1 stage=graph
group @g {group}
func @f(%x: f32[2]) -> (f32[2]) {{
  %s = comm.all_reduce_start(%x, group=@g) : !future<f32[2]>
  %y = comm.wait(%s) : f32[2]
  return %y
}}
"""


# ------------------------------------------------------------------------------------------------------------ rank dims

SHARES = """xir 1 stage=graph
dim N in [1, 8]
dim T in [0, 1]
dim D in [0, 2]
group @tp size=2 rank=T
group @dp size=3 stride=2 rank=D
func @f(%x: f32[N, 12]) -> (f32[N, 2], f32[4]) {
  %own = t.slice(%x, axis=1, start=2*D + 6*T, stop=2*D + 6*T + 2) : f32[N, 2]
  %w = param(name="w") : f32[24]
  %one = t.slice(%w, axis=0, start=12*T + 4*D, stop=12*T + 4*D + 4) : f32[4]
  %two = t.add(%one, %one) : f32[4]
  return %own, %two
}
"""


def test_a_rank_dim_is_a_place_in_its_group() -> None:
    module = parse_module(SHARES)
    verify(module)
    x, w = np.arange(24, dtype=np.float32).reshape(2, 12), np.arange(24, dtype=np.float32)
    got = run_ranks(module, "f", [{"x": x}] * 6, [{"w": w}] * 6)
    two = module.func("f").returns[1]
    for rank, (own, twice) in enumerate(got):
        t, d = rank % 2, rank // 2
        np.testing.assert_array_equal(own, x[:, 2 * d + 6 * t :][:, :2])
        np.testing.assert_array_equal(twice, 2 * w[12 * t + 4 * d :][:4])
        np.testing.assert_array_equal(run_value(two, {"w": w}, ranks={"T": t, "D": d}), twice)
    with pytest.raises(IrError, match="T = 1 is given") as e:
        run_ranks(module, "f", [{"x": x}] * 6, [{"w": w}] * 6, {"T": 1})
    assert "place in @tp" in e.value.help
    with pytest.raises(IrError, match="the groups need 6 ranks, 1 are run"):
        run(module, "f", {"x": x}, {"w": w})


def test_ranks_may_have_sizes_of_their_own_until_they_meet() -> None:
    text = """xir 1 stage=sched
dim N in [1, 8]
group @dp size=2
func @f(%x: f32[N, 2], %y: f32[2]) -> (f32[N, 2]) {
  %f = comm.all_reduce_start(%y, group=@dp) : !future<f32[2]>
  %s = comm.wait(%f) : f32[2]
  %z = t.add(%x, %s) : f32[N, 2]
  return %z
}
"""
    module = parse_module(text)
    inputs = [{"x": np.zeros((n, 2), np.float32), "y": np.full(2, n, np.float32)} for n in (1, 3)]
    for got in (run_ranks(module, "f", inputs, [{}] * 2), run_interleaved_ranks(module, "f", inputs, [{}] * 2, seed=1)):
        assert [r[0].shape for r in got] == [(1, 2), (3, 2)] and all((r[0] == 4).all() for r in got)
    meeting = parse_module(
        text.replace("start(%y", "start(%x")
        .replace("future<f32[2]>", "future<f32[N, 2]>")
        .replace("wait(%f) : f32[2]", "wait(%f) : f32[N, 2]")
    )
    for call in (run_ranks, lambda *a: run_interleaved_ranks(*a, seed=1)):
        with pytest.raises(IrError, match=r"bring shapes \[1, 2\], \[3, 2\] to comm.all_reduce_start"):
            call(meeting, "f", inputs, [{}] * 2)


# --------------------------------------------------------------------------------------------------------- partial sums


def test_partial_sums_are_f32_and_rounded_once() -> None:
    """bf16 would lose both halves of 1 + 2^-9 + 2^-9 that the ranks hold; the sum in f32 keeps them."""
    text = """xir 1 stage=graph
group @tp size=2
func @f(%x: bf16[1, 2]) -> (bf16[1, 1], f32[1, 1]) {
  %w = param(name="w") : bf16[1, 2]
  %p = nn.linear(%x, %w, partial=@tp) : f32[1, 1] partial(@tp)
  %f = comm.all_reduce_start(%p, group=@tp) : !future<f32[1, 1]>
  %s = comm.wait(%f) : f32[1, 1]
  %y = t.cast(%s, dtype=bf16) : bf16[1, 1]
  return %y, %s
}
"""
    module = parse_module(text)
    verify(module)
    bf16 = ml_dtypes.bfloat16
    inputs = [{"x": np.array([[1, 2.0**-8]], bf16)}] * 2
    weights = [{"w": np.array([[1, 0.5]], bf16)}, {"w": np.array([[0, 0.5]], bf16)}]
    for y, s in run_ranks(module, "f", inputs, weights):
        assert s[0, 0] == np.float32(1 + 2.0**-8) and y[0, 0] == bf16(1)
    weights[1] = {"w": np.array([[0, 1.5]], bf16)}
    for y, s in run_ranks(module, "f", inputs, weights):
        assert s[0, 0] == np.float32(1 + 2.0**-7) and float(y[0, 0]) == 1 + 2.0**-7
    with pytest.raises(IrError, match="a partial sum over @tp in bf16"):
        Tensor("bf16", [2], "tp")


@pytest.mark.parametrize("order", [(1e8, -1e8, 1.0), (1.0, 1e8, -1e8)])
def test_sums_are_in_rank_order(order: tuple[float, ...]) -> None:
    module = parse_module(TEXT.format(group="size=3"))
    got = run_ranks(module, "f", [{"x": np.full(2, v, np.float32)} for v in order], [{}] * 3)
    assert world_size(module.groups) == 3
    assert {float(r[0][0]) for r in got} == {1.0 if order[-1] == 1.0 else 0.0}
