"""Made-up inputs are sound for every function, and nasty within that."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm_compiler.errors import XllmError
from xllm_compiler.interp import run_ranks
from xllm_compiler.ir.parser import parse_module
from xllm_compiler.testing.corpus import corpus, entry
from xllm_compiler.testing.graphs import random_module
from xllm_compiler.testing.inputs import make, rank_local, ranks_of, step_dims, telling_sizes
from xllm_compiler.testing.ranges import Range, index_ranges


def step(columns: int = 4, page: int = 4, head: str = "assume N - B >= 0\n", names: str = "pos seq start table") -> str:
    pos, seq, start, table = (f"%{n}" for n in names.split())
    kv = f"kv<f32, heads=1, k=4, v=4, page={page}>[P]"
    return f"""xir 1 stage=graph
dim N in [1, 64]
dim B in [1, 8]
dim S in [0, 8]
dim P in [1, 64]
{head}
func @step({pos}: i32[N], {seq}: i32[N], {start}: i32[B + 1], {table}: i32[B, {columns}], %sel: i32[S],
    %k: f32[N, 1, 4], %kv: {kv}) -> (f32[S, 1, 4], {kv} alias %kv) {{
  %kv1 = kv.write(%kv, %k, %k, {pos}, {seq}, {table}) : {kv}
  %y = kv.attend(%kv1, %k, {pos}, {seq}, {start}, {table}, scale=1.0) : f32[N, 1, 4]
  %s = t.take(%y, %sel) : f32[S, 1, 4]
  return %s, %kv1
}}
"""


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 32),
    b=st.integers(1, 8),
    page=st.sampled_from([2, 4, 16]),
    seed=st.integers(0, 5),
    names=st.sampled_from(["pos seq start table", "where who from pages"]),
)
def test_a_step_is_sound_whatever_its_arguments_are_called(n: int, b: int, page: int, seed: int, names: str) -> None:
    b = min(b, n)
    func = parse_module(step(16, page, names=names)).func()
    made = make(func, {"N": n, "B": b}, seed)
    pos, seq, start, table = (made.inputs[0][name] for name in names.split())
    assert made.dims["N"] == n and made.dims["B"] == b
    assert list(start) == sorted(start) and start[0] == 0 and start[-1] == n
    pages: list[int] = []
    for i in range(b):
        mine = pos[start[i] : start[i + 1]]
        assert len(mine) >= 1 and list(seq[start[i] : start[i + 1]]) == [i] * len(mine)
        assert list(mine) == list(range(mine[0], mine[0] + len(mine)))
        used = -(-(int(mine[-1]) + 1) // page)
        assert np.all(table[i, :used] >= 0) and np.all(table[i, used:] == -1)
        pages += [int(p) for p in table[i, :used]]
    assert len(pages) == len(set(pages)) and max(pages) < made.dims["P"]
    run_ranks(func.module, "step", made.inputs, made.params, made.dims)


def test_a_step_is_nasty() -> None:
    func = parse_module(step(16)).func()
    contexts, orders, counts = set(), set(), set()
    for seed in range(12):
        made = make(func, {"N": 9, "B": 3}, seed).inputs[0]
        start, pos = made["start"], made["pos"]
        contexts.add(tuple(int(pos[s]) for s in start[:-1]))
        counts.add(tuple(np.diff(start).tolist()))
        orders.add(tuple(made["table"][0, :2].tolist()))
        assert {0.0, 6.0} <= set(made["k"].ravel().tolist())
    assert all(c[0] == 0 for c in contexts) and len(contexts) > 6
    assert len(counts) > 4 and len(orders) > 6
    assert make(func, 9, 3).inputs[0]["pos"].tolist() == make(func, 9, 3).inputs[0]["pos"].tolist()


def test_sizes_are_completed_or_refused_with_a_reason() -> None:
    func = parse_module(step()).func()
    assert step_dims(func, 7) == {"N": 7, "B": 3, "S": 3, "P": 12}
    assert step_dims(func, {"P": 20, "N": 2}) == {"N": 2, "B": 1, "S": 1, "P": 20}
    with pytest.raises(XllmError, match=r"meet the assumption .*every request") as e:
        step_dims(parse_module(step(head="assume N - B >= 0  // every request\n")).func(), {"N": 2, "B": 3})
    assert e.value.help == "give sizes for B, N"
    with pytest.raises(XllmError, match=r"N = 65 is outside \[1, 64\]"):
        step_dims(func, {"N": 65})
    with pytest.raises(XllmError, match="the module has no symbol M") as e:
        step_dims(func, {"M": 1})
    assert e.value.help == "it has N, B, S, P"
    with pytest.raises(XllmError, match="a step of 64 tokens does not fit into 2 requests of at most 16 positions"):
        make(func, {"N": 64, "B": 2})
    with pytest.raises(XllmError, match="does not fit into 3 pages of 4; "):
        make(func, {"N": 16, "B": 1, "P": 3})


def test_odd_assumptions_are_met() -> None:
    head = "dim C in [3, 300] % 3\ndim D in [0, 9]\nassume N - B >= 0\nassume C - 2*N >= 0\nassume 1 - C % 2 - D >= 0\n"
    dims = step_dims(parse_module(step(head=head)).func(), 7)
    assert dims["C"] >= 14 and dims["C"] % 3 == 0 and dims["D"] <= 1 - dims["C"] % 2


def test_telling_sizes() -> None:
    func = parse_module(step(columns=16)).func()
    assert [(d["N"], d["B"]) for d in telling_sizes(func)] == [(1, 1), (3, 3), (7, 3), (64, 8)]
    plain = parse_module("xir 1 stage=graph\n\nfunc @f(%x: f32[3]) -> (f32[3]) {\n  return %x\n}\n").func("f")
    assert telling_sizes(plain) == [{}]


INDEX = """xir 1 stage=graph
dim N in [1, 64]

func @f(%ids: i32[N], %free: i32[N], %e: i32[N]) -> (f32[N, 4], i32[N], i32[N]) {
  %w = param(name="w") : f32[32, 4]
  %map = param(name="map") : i32[10]
  %two = t.const(value=2, dtype=i32) : i32[]
  %a = t.add(%ids, %two) : i32[N]
  %h = t.floordiv(%a, %two) : i32[N]
  %m = t.take(%map, %h) : i32[N]
  %d = t.mul(%m, %two) : i32[N]
  %y = nn.embedding(%d, %w) : f32[N, 4]
  %q = t.pow(%two, %e) : i32[N]
  %f = t.neg(%free) : i32[N]
  return %y, %f, %q
}
"""


def test_integers_stay_in_the_range_of_what_they_index() -> None:
    func = parse_module(INDEX).func("f")
    ranges = {v.name: r for v, r in index_ranges(func, {"N": 5}).items() if v.op is None or v.name == "map"}
    assert ranges == {"ids": Range(-2, 17), "map": Range(0, 15), "e": Range(0, 4)}
    seen: set[int] = set()
    for seed in range(8):
        made = make(func, 5, seed)
        run_ranks(func.module, "f", made.inputs, made.params, made.dims)
        seen |= set(made.inputs[0]["ids"].tolist())
        assert {0, 15} <= set(made.params[0]["map"].tolist())
    assert {-2, 17} <= seen


def test_ranks_differ_only_in_what_is_combined() -> None:
    text = """xir 1 stage=graph
dim N in [1, 64]
group @tp size=2

func @f(%x: f32[N, 8], %res: f32[N, 8]) -> (f32[N, 8]) {
  %wn = param(name="norm") : f32[8]
  %w1 = param(name="own") : f32[8, 8]
  %w2 = param(name="shared") : f32[8, 8]
  %n = nn.rms_norm(%x, w=%wn, eps=1e-06) : f32[N, 8]
  %a = nn.linear(%n, %w1, partial=@tp) : f32[N, 8] partial(@tp)
  %s = comm.all_reduce_start(%a, group=@tp) : !future<f32[N, 8]>
  %r = comm.wait(%s) : f32[N, 8]
  %y = nn.linear(%r, %w2, residual=%res) : f32[N, 8]
  return %y
}
"""
    module = parse_module(text)
    assert ranks_of(module) == 2
    made = make(module.func("f"), 3)
    assert len(made.inputs) == len(made.params) == 2
    same = {k: np.array_equal(made.params[0][k], made.params[1][k]) for k in made.params[0]}
    assert same == {"norm": True, "own": False, "shared": True}
    assert all(np.array_equal(made.inputs[0][k], made.inputs[1][k]) for k in ("x", "res"))
    first, second = run_ranks(module, "f", made.inputs, made.params, made.dims, True)
    assert np.array_equal(first[0], second[0])


def test_what_a_rank_dim_cuts_is_the_same_on_all_ranks() -> None:
    """Every rank takes its share of the whole, so that a rewrite may put shares together again."""
    func = entry("written/decoder-tp2").module().func("step")
    assert not rank_local(func)
    made = make(func, 5)
    assert "R" not in made.dims and len(made.params) == 2
    assert all(np.array_equal(made.params[0][k], made.params[1][k]) for k in made.params[0])
    assert rank_local(entry("written/mesh").module().func("experts")) == {"x"}


def test_groups_of_different_size_make_one_world() -> None:
    body = "".join(
        f"  %f{g} = comm.all_reduce_start(%x, group=@{g}) : !future<f32[4]>\n  %y{g} = comm.wait(%f{g}) : f32[4]\n"
        for g in "ab"
    )
    head = "xir 1 stage=graph\ngroup @a size=2\ngroup @b size=4\n"
    text = f"{head}\nfunc @f(%x: f32[4]) -> (f32[4]) {{\n{body}  return %x\n}}\n"
    assert ranks_of(parse_module(text)) == 4
    with pytest.raises(XllmError, match="the groups need 128 ranks"):
        ranks_of(parse_module(text.replace("size=4", "size=128")))


@pytest.mark.parametrize("seed", range(12))
def test_random_modules_can_be_run(seed: int) -> None:
    module = random_module(random.Random(seed).randrange, size=16)
    for func in module.funcs.values():
        for dims in telling_sizes(func)[:3]:
            made = make(func, dims, seed)
            run_ranks(module, func.name, made.inputs, made.params, made.dims)


def test_every_shipped_module_can_be_run() -> None:
    for e in corpus(random_graphs=0)[::6]:
        module = e.module()
        for func in module.funcs.values():
            made = make(func, {"N": 5} if "N" in module.scope.symbols else {})
            run_ranks(module, func.name, made.inputs, made.params, made.dims)


def test_an_index_that_a_cell_remembers_stays_in_its_range() -> None:
    """The rows of the table bound what may be in the cell, and what may be written to it."""
    module = parse_module("""xir 1 stage=graph
dim B in [1, 8]
dim Q in [1, 64]
assume Q - B >= 0

func @f(%token: i32[B], %slot: i32[B], %last: cell<i32, []>[Q]) -> (f32[B, 2], cell<i32, []>[Q] alias %last) {
  %w = param(name="w") : f32[3, 2]
  %before = state.read(%last, %slot) : i32[B]
  %y = nn.embedding(%before, %w) : f32[B, 2]
  %now = state.write(%last, %token, %slot) : cell<i32, []>[Q]
  %next = state.read(%now, %slot) : i32[B]
  %z = nn.embedding(%next, %w) : f32[B, 2]
  %sum = t.add(%y, %z) : f32[B, 2]
  return %sum, %now
}
""")
    func = module.func("f")
    for seed in range(8):
        made = make(func, {"B": 4}, seed)
        arrays = made.inputs[0]
        assert made.dims["Q"] > 4 and len(set(arrays["slot"].tolist())) == 4
        assert arrays["last"].shape == (made.dims["Q"],) and arrays["last"].dtype == np.int32
        for name in ("last", "token"):
            assert set(arrays[name].tolist()) <= {0, 1, 2}
        run_ranks(module, "f", made.inputs, made.params, made.dims)
