"""plan-memory: offsets that provably do not overlap, and few bytes. The verifier proves V13 to V15 after each run; here
the plan is also tried by running functions in an arena whose bytes know their owners, which would show what a wrong
proof let through. Plans for several streams: test_stream_orders.py."""

from __future__ import annotations

import random

import numpy as np
import pytest

from xllm_compiler.interp import run, run_interleaved
from xllm_compiler.ir.clone import clone_module
from xllm_compiler.testing.graphs import random_module
from xllm_compiler.testing.inputs import make
from xllm_compiler.testing.xir import Case

HEAD = "xir 1 stage=graph\ndim N in [1, 512]\ndim S in [0, 64]\n"


def func(body: str, returns: str = "f32[N, 8]", args: str = "%x: f32[N, 8]") -> Case:
    return Case.parse(f"{HEAD}\nfunc @f({args}) -> ({returns}) {{\n{body}\n}}\n").run("assign-streams,plan-memory")


def test_a_chain_takes_two_places() -> None:
    case = func(
        """  %a = t.exp(%x) : f32[N, 8]
  %b = t.neg(%a) : f32[N, 8]
  %c = t.abs(%b) : f32[N, 8]
  %d = t.exp(%c) : f32[N, 8]
  %e = t.neg(%d) : f32[N, 8]
  return %e"""
    )
    assert "arena(128*ceildiv(N, 2))" in case.text
    assert case.text.count("at=[0]") == 2 and case.text.count("at=[64*ceildiv(N, 2)]") == 2
    assert case.ctx.stats["plan-memory"] == {"buffers": 4, "arena-bytes": 32768, "live-bytes": 32768}


def test_what_needs_no_place_gets_none() -> None:
    case = func(
        """  %w = param(name="w") : f32[8, 8]
  %w2 = t.add(%w, %w) : f32[8, 8]
  %r = t.reshape(%x, shape=[N, 8]) : f32[N, 8]
  %y = nn.linear(%r, %w2) : f32[N, 8]
  return %y"""
    )
    assert "at=" not in case.text and "arena(0)" in case.text


def test_a_view_shares_its_operands_place() -> None:
    case = func(
        """  %a = t.exp(%x) : f32[N, 8]
  %v = t.reshape(%a, shape=[N, 2, 4]) : f32[N, 2, 4]
  %b = t.exp(%x) : f32[N, 8]
  %c = t.neg(%v) : f32[N, 2, 4]
  %d = t.reshape(%c, shape=[N, 8]) : f32[N, 8]
  %y = t.add(%b, %d) : f32[N, 8]
  return %y"""
    )
    lines = {line.split(" = ")[0].strip(): line for line in case.text.splitlines() if " = " in line}
    at = {name: line[line.index("at=") :].split("]")[0] for name, line in lines.items() if "at=" in line}
    assert at["%v"] == at["%a"] and at["%d"] == at["%c"] and len({at["%a"], at["%b"], at["%c"]}) == 3


def test_sizes_that_cannot_be_compared_are_stacked() -> None:
    """N against S: whichever is larger at run time, nothing overlaps."""
    case = func(
        """  %a = t.exp(%x) : f32[N, 8]
  %b = t.exp(%s) : f32[S, 8]
  %c = t.neg(%b) : f32[S, 8]
  %d = t.neg(%a) : f32[N, 8]
  %p = t.abs(%c) : f32[S, 8]
  %q = t.abs(%d) : f32[N, 8]
  return %p, %q""",
        "f32[S, 8], f32[N, 8]",
        "%x: f32[N, 8], %s: f32[S, 8]",
    )
    for n, s in ((1, 0), (1, 64), (512, 3), (7, 7)):
        rng = np.random.default_rng(n)
        inputs = {"x": rng.standard_normal((n, 8), np.float32), "s": rng.standard_normal((s, 8), np.float32)}
        dims = {"N": n, "S": s}
        got = run_interleaved(case.after, "f", inputs, {}, dims, seed=0)
        for a, b in zip(run(case.before, "f", inputs, {}, dims), got, strict=True):
            assert np.array_equal(a, b)


def test_an_unbounded_size_is_an_error() -> None:
    from xllm_compiler.errors import XllmError

    text = "xir 1 stage=graph\ndim N in [1, *]\n\nfunc @f(%x: f32[N]) -> (f32[N]) {\n  %a = t.exp(%x) : f32[N]\n"
    with pytest.raises(XllmError, match="N may grow without limit"):
        Case.parse(text + "  %y = t.exp(%a) : f32[N]\n  return %y\n}\n").run("assign-streams,plan-memory")


def test_the_plan_is_deterministic_and_tight() -> None:
    """A decoder-like chain of 40 layers: the arena is what is live, to a tenth."""
    body, h = [], "%x"
    for i in range(40):
        w = f'  %w{i} = param(name="w{i}") : f32[8]'
        u = f'  %u{i} = param(name="u{i}") : f32[64, 8]\n  %d{i} = param(name="d{i}") : f32[8, 64]'
        body += [w, u, f"  %n{i} = nn.rms_norm({h}, w=%w{i}, eps=1e-06) : f32[N, 8]"]
        body += [f"  %a{i} = nn.linear(%n{i}, %u{i}, act=silu) : f32[N, 64]"]
        body += [f"  %h{i} = nn.linear(%a{i}, %d{i}, residual={h}) : f32[N, 8]"]
        h = f"%h{i}"
    text = "\n".join(body) + f"\n  return {h}"
    case, again = func(text), func(text)
    assert case.text == again.text
    stats = case.ctx.stats["plan-memory"]
    assert stats["buffers"] == 119 and stats["arena-bytes"] <= 1.1 * stats["live-bytes"]


@pytest.mark.parametrize("seed", range(40))
def test_random_functions_run_in_their_arena(seed: int) -> None:
    module = random_module(random.Random(seed).randrange, size=24, ranks=(1,))
    case = Case(module, clone_module(module)).run("assign-streams,plan-memory")
    for func in case.before.funcs.values():
        for n in (1, 5):
            given = make(func, n, seed)
            (inputs,), (params,) = given.inputs, given.params
            want = run(case.before, func.name, inputs, params, given.dims)
            got = run_interleaved(case.after, func.name, inputs, params, given.dims, seed=seed)
            for a, b in zip(want, got, strict=True):
                assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes(), seed
