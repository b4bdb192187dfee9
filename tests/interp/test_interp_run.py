"""Running functions: inputs are checked, memory is let go, ranks meet in collectives, weights stand alone."""

import weakref
from collections.abc import Iterator, Mapping

import numpy as np
import pytest

from xllm_compiler.interp.run import run, run_ranks, run_value
from xllm_compiler.ir.diag import IrError
from xllm_compiler.ir.parser import parse_module
from xllm_compiler.ir.semantics import Array

TEXT = """xir 1 stage=graph
dim N in [1, 8]
dim B in [1, 8]
assume N - B >= 0  // a token each
func @step(%x: f32[N, 4], %start: i32[B + 1]) -> (f32[N, 8]) {
  %a = param(name="a") : f32[4, 4]
  %b = param(name="b") : f32[4, 4]
  %w = t.concat(%a, %b, axis=0) : f32[8, 4]
  %y = nn.linear(%x, %w) : f32[N, 8]
  return %y
}
"""


def params() -> dict[str, Array]:
    rng = np.random.default_rng(0)
    return {k: rng.normal(size=(4, 4)).astype(np.float32) for k in "ab"}


def test_run_and_dims() -> None:
    module, p = parse_module(TEXT), params()
    x, start = np.ones((3, 4), np.float32), np.array([0, 1, 3], np.int32)
    want = x @ np.concatenate([p["a"], p["b"]]).T
    for dims in ({"B": 2}, {"N": 3, "B": 2}):
        np.testing.assert_allclose(run(module, "step", {"x": x, "start": start}, p, dims)[0], want, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "dims", "message"),
    [
        ({"x": None}, {"B": 2}, "no input for %x"),
        ({"x": np.ones((3, 5), np.float32)}, {"B": 2}, r"has shape \[3, 5\], f32\[N, 4\] is \[3, 4\]"),
        ({"x": np.ones((3, 4), np.float64)}, {"B": 2}, "is f64, wanted f32"),
        ({"y": np.ones(1)}, {"B": 2}, "no argument y"),
        ({"x": np.ones((9, 4), np.float32)}, {"B": 2}, r"N = 9 is outside \[1, 8\]"),
        ({}, {"B": 4}, "break the assumption"),
        ({}, {"N": 2, "B": 2}, r"is \[2, 4\]"),
    ],
)
def test_inputs_are_checked(change: dict[str, Array | None], dims: dict[str, int], message: str) -> None:
    given: dict[str, Array | None] = {"x": np.ones((3, 4), np.float32), "start": np.array([0, 1, 3], np.int32)}
    given |= change
    with pytest.raises(IrError, match=message):
        run(parse_module(TEXT), "step", {k: v for k, v in given.items() if v is not None}, params(), dims)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"a": None}, "no parameter 'a'"),
        ({"a": np.ones((4, 5), np.float32)}, r"parameter 'a' has shape \[4, 5\]"),
        ({"a": np.ones((4, 4), np.float16)}, "parameter 'a' is float16"),
    ],
)
def test_parameters_are_checked_and_the_op_is_shown(bad: dict[str, Array | None], message: str) -> None:
    p = {k: v for k, v in (params() | bad).items() if v is not None}
    given = {"x": np.ones((3, 4), np.float32), "start": np.array([0, 1, 3], np.int32)}
    with pytest.raises(IrError, match=message) as e:
        run(parse_module(TEXT), "step", given, p, {"B": 2})
    assert '> %a = param(name="a")' in e.value.where


class Counting(Mapping[str, Array]):
    """Makes each parameter when asked, and knows how many of them are still alive."""

    def __init__(self) -> None:
        self.alive = 0
        self.peak = 0

    def __getitem__(self, name: str) -> Array:
        x = np.full((64, 64), float(name), np.float32)
        self.alive += 1
        self.peak = max(self.peak, self.alive)
        weakref.finalize(x, self._gone)
        return x

    def _gone(self) -> None:
        self.alive -= 1

    def __contains__(self, name: object) -> bool:
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


def test_weight_expressions_stand_alone_and_let_go() -> None:
    lines = ['  %s0 = param(name="0") : f32[64, 64]']
    for i in range(1, 12):
        lines += [f'  %p{i} = param(name="{i}") : f32[64, 64]', f"  %s{i} = t.add(%s{i - 1}, %p{i}) : f32[64, 64]"]
    lines += ['  %other = param(name="99") : f32[64, 64]', "  %t = t.transpose(%s11, perm=[1, 0]) : f32[64, 64]"]
    text = "xir 1 stage=graph\nfunc @f() -> (f32[64, 64]) {\n" + "\n".join(lines) + "\n  return %t\n}\n"
    func = parse_module(text).funcs["f"]
    last = func.returns[0]
    source = Counting()
    got = run_value(last, source)
    assert got.flags.c_contiguous and float(got[0, 0]) == sum(range(12))
    assert source.peak <= 3 and source.alive == 0


def test_only_weight_expressions() -> None:
    func = parse_module(TEXT).funcs["step"]
    np.testing.assert_array_equal(run_value(func.ops[2].result, params())[:4], params()["a"])
    with pytest.raises(IrError, match="depends on argument %x"):
        run_value(func.returns[0], params())
    with pytest.raises(IrError, match="is an argument"):
        run_value(func.args[0], params())


RANKS = """xir 1 stage=graph
dim N in [1, 8]
group @tp size=2
func @step(%x: f32[N, 3]) -> (f32[N, 5]) {
  %w = param(name="w") : f32[5, 3]
  %p = nn.linear(%x, %w, partial=@tp) : f32[N, 5] partial(@tp)
  %d = t.add(%p, %p) : f32[N, 5] partial(@tp)
  %f = comm.all_reduce_start(%d, group=@tp) : !future<f32[N, 5]>
  %y = comm.wait(%f) : f32[N, 5]
  return %y
}
"""


def test_ranks_in_lockstep() -> None:
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(4, 6)).astype(np.float32), rng.normal(size=(5, 6)).astype(np.float32)
    inputs = [{"x": x[:, :3]}, {"x": x[:, 3:]}]
    weights = [{"w": w[:, :3]}, {"w": w[:, 3:]}]
    module = parse_module(RANKS)
    for out in run_ranks(module, "step", inputs, weights):
        np.testing.assert_allclose(out[0], 2 * x @ w.T, rtol=1e-5, atol=1e-5)
    with pytest.raises(IrError, match="the groups need 2 ranks, 1 are run"):
        run(module, "step", inputs[0], weights[0])


def test_precise_runs_in_f64() -> None:
    text = TEXT.replace("f32[", "bf16[")
    rng = np.random.default_rng(1)
    p = {k: rng.normal(size=(4, 4)) for k in "ab"}
    x = rng.normal(size=(3, 4))
    got = run(parse_module(text), "step", {"x": x, "start": np.array([0, 3], np.int32)}, p, {"B": 1}, precise=True)[0]
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, x @ np.concatenate([p["a"], p["b"]]).T, rtol=1e-13)


def test_values_outside_an_arguments_range_are_refused() -> None:
    text = "xir 1 stage=graph\ndim N in [1, 8]\n\nfunc @f(%pos: i32[N] in [0, 3]) -> (i32[N]) {\n  return %pos\n}\n"
    module = parse_module(text)
    (got,) = run(module, "f", {"pos": np.array([0, 3], np.int32)})
    assert got.tolist() == [0, 3]
    for wrong in ([4], [0, -1]):
        with pytest.raises(IrError, match=r"outside \[0, 3\]"):
            run(module, "f", {"pos": np.array(wrong, np.int32)})
