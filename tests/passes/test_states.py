"""A recurrent function through every pass of @cpu: two steps of it stay what numpy computes."""

import numpy as np
import pytest

from xllm_compiler.errors import XllmError
from xllm_compiler.interp import run
from xllm_compiler.interp.streams import run_interleaved
from xllm_compiler.ir.core import Module
from xllm_compiler.ir.diag import IrError
from xllm_compiler.ir.parser import parse_module
from xllm_compiler.ir.semantics import Array
from xllm_compiler.ir.verify import verify
from xllm_compiler.lowering.storage import Storage
from xllm_compiler.passes.manager import item_text, parse_pipeline, run_pipeline
from xllm_compiler.passes.schedule.events import insert_events

RECURRENT = """xir 1 stage=graph
dim B in [1, 8]
dim Q in [1, 64]
assume Q - B >= 0

func @step(%x: f32[B, 8], %slot: i32[B], %h0: cell<f32, [2, 4]>[Q], %last: cell<i32, []>[Q], %token: i32[B])
    -> (f32[B, 8], cell<f32, [2, 4]>[Q] alias %h0, cell<i32, []>[Q] alias %last) {
  %decay = param(name="decay") : f32[2, 4]
  %w = param(name="w") : f32[8, 8]
  %bias = param(name="bias") : f32[8]
  %embed = param(name="embed") : f32[16, 8]
  %dead = state.read(%last, %slot) : i32[B]
  %before = state.read(%last, %slot) : i32[B]
  %seen = nn.embedding(%before, %embed) : f32[B, 8]
  %now = state.write(%last, %token, %slot) : cell<i32, []>[Q]
  %both = t.add(%x, %seen) : f32[B, 8]
  %u = nn.linear(%both, %w) : f32[B, 8]
  %ub = t.add(%u, %bias) : f32[B, 8]
  %heads = t.reshape(%ub, shape=[B, 2, 4]) : f32[B, 2, 4]
  %old = state.read(%h0, %slot) : f32[B, 2, 4]
  %again = state.read(%h0, %slot) : f32[B, 2, 4]
  %half = t.const(value=0.5) : f32[]
  %twice = t.add(%old, %again) : f32[B, 2, 4]
  %once = t.mul(%twice, %half) : f32[B, 2, 4]
  %kept = t.mul(%once, %decay) : f32[B, 2, 4]
  %new = t.add(%kept, %heads) : f32[B, 2, 4]
  %h1 = state.write(%h0, %new, %slot) : cell<f32, [2, 4]>[Q]
  %read = state.read(%h1, %slot) : f32[B, 2, 4]
  %flat = t.reshape(%read, shape=[B, 8]) : f32[B, 8]
  %y = t.add(%flat, %x) : f32[B, 8]
  return %y, %h1, %now
}
"""
SLOTS, DIMS = 5, {"B": 3, "Q": 5}
ROWS = ([4, 0, 2], [0, 3, 4])  # the slots of the two steps: two requests go on, one ends and one begins


def arrays() -> tuple[dict[str, Array], list[dict[str, Array]]]:
    """(parameters, inputs of each step but the cells)."""
    rng = np.random.default_rng(3)
    shapes = {"decay": (2, 4), "w": (8, 8), "bias": (8,), "embed": (16, 8)}
    params = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    steps: list[dict[str, Array]] = [
        {
            "x": rng.standard_normal((3, 8)).astype(np.float32),
            "slot": np.array(slot, np.int32),
            "token": rng.integers(0, 16, 3).astype(np.int32),
        }
        for slot in ROWS
    ]
    return params, steps


def expected() -> list[list[Array]]:
    params, steps = arrays()
    h, last = np.zeros((SLOTS, 2, 4)), np.zeros(SLOTS, np.int32)
    out = []
    for step in steps:
        slot = step["slot"]
        u = (step["x"] + params["embed"][last[slot]]).astype(np.float64) @ params["w"].T + params["bias"]
        h[slot] = h[slot] * params["decay"] + u.reshape(3, 2, 4)
        last[slot] = step["token"]
        out.append([h[slot].reshape(3, 8) + step["x"], h.copy(), last.copy()])
    return out


def two_steps(module: Module, seed: int | None = None) -> list[list[Array]]:
    params, steps = arrays()
    cells: dict[str, Array] = {"h0": np.zeros((SLOTS, 2, 4), np.float32), "last": np.zeros(SLOTS, np.int32)}
    out = []
    for step in steps:
        if seed is None:
            got = run(module, "step", {**step, **cells}, params, DIMS)
        else:
            got = run_interleaved(module, "step", {**step, **cells}, params, DIMS, seed=seed)
        aliases = module.func("step").aliases
        cells = {aliases[i].name: x for i, x in enumerate(got) if i in aliases}
        out.append([got[0], cells["h0"], cells["last"]])
    return out


def check(got: list[list[Array]]) -> None:
    for ours, numpys in zip(got, expected(), strict=True):
        for x, want in zip(ours, numpys, strict=True):
            np.testing.assert_allclose(x, want, 1e-5, 1e-5)


def test_every_pass_keeps_a_recurrent_function() -> None:
    module = parse_module(RECURRENT)
    verify(module)
    check(two_steps(module))
    for each in parse_pipeline("@cpu").passes():
        run_pipeline(item_text(each), module)
        verify(module)
        check(two_steps(module))
    assert module.stage == "buf"
    names = [op.name for op in module.func("step").ops]
    assert names.count("state.read") == 3 and names.count("state.write") == 2, "reads of one version are one read"
    for seed in range(5):
        check(two_steps(module, seed))


@pytest.mark.parametrize("seed", range(8))
def test_streams_are_ordered_by_versions(seed: int) -> None:
    """Ops anywhere on three streams, with the events that they need."""
    module = parse_module(RECURRENT)
    rng = np.random.default_rng(seed)
    func = module.func("step")
    for op in func.ops:
        op.set_attr("stream", int(rng.integers(3)))
    insert_events(func, "test")
    module.stage = "sched"
    verify(module)
    for order in range(3):
        check(two_steps(module, order))


SPLIT = """xir 1 stage=sched
dim B in [1, 8]
dim Q in [1, 64]
assume Q - B >= 0

func @step(%x: f32[B], %slot: i32[B], %h0: cell<f32, []>[Q]) -> (f32[B], cell<f32, []>[Q] alias %h0) {
  %old = state.read(%h0, %slot, stream=1) : f32[B]
  %e = sched.record(stream=1) : !event
  sched.wait(%e)
  %h1 = state.write(%h0, %x, %slot) : cell<f32, []>[Q]
  return %old, %h1
}
"""


def test_a_read_that_may_come_after_the_write_is_found_by_proof_and_by_running() -> None:
    verify(parse_module(SPLIT))
    module = parse_module(SPLIT.replace("  sched.wait(%e)\n", ""))
    with pytest.raises(IrError, match=r"V18: state\.write on stream 0 uses up state version %h0, which state\.read on"):
        verify(module)
    given = {"x": np.ones(2, np.float32), "slot": np.array([1, 0], np.int32), "h0": np.zeros(2, np.float32)}
    with pytest.raises(IrError, match=r"reads state version %h0 after state\.write on stream 0 has made %h1 of it"):
        for seed in range(20):
            run_interleaved(module, "step", given, {}, {"B": 2, "Q": 2}, seed=seed)


def test_a_cell_is_refused_where_memory_is_laid_out() -> None:
    module = parse_module(RECURRENT)
    with pytest.raises(XllmError, match=r"@step keeps %h0: cell<f32, \[2, 4\]>\[Q\], and no kernel") as e:
        Storage(module.func("step"), module.scope)
    assert e.value.kind == "unsupported" and "xllm-run" in e.value.help
