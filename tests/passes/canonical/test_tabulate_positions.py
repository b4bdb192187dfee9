"""tabulate-positions: functions of the position become tables with a row per position."""

from __future__ import annotations

import numpy as np

from xllm_compiler.analysis.weights import is_weight_expr
from xllm_compiler.interp import run, run_value
from xllm_compiler.testing.xir import Case

HEAD = "xir 1 stage=graph\ndim N in [1, 64]\ndim B in [1, 8]\n"


def func(body: str, returns: str, args: str = "%pos: i32[N] in [0, 63], %table: i32[B, 4], %x: f32[N, 8]") -> Case:
    return Case.parse(f"{HEAD}\nfunc @f({args}) -> ({returns}) {{\n{body}\n}}\n")


ROTARY = """  %f = param(name="inv_freq") : f32[8]
  %c = t.cast(%pos, dtype=f32) : f32[N]
  %c1 = t.reshape(%c, shape=[N, 1]) : f32[N, 1]
  %m = t.mul(%c1, %f) : f32[N, 8]
  %cos = t.cos(%m) : f32[N, 8]
"""


def test_rotary_angles_become_a_table() -> None:
    case = func(ROTARY + "  %y = t.mul(%x, %cos) : f32[N, 8]\n  return %y", "f32[N, 8]").run("tabulate-positions")
    ops = list(case.after.func("f").ops)
    (look,) = [op for op in ops if op.name == "nn.embedding"]
    assert look.operands[0].name == "pos" and is_weight_expr(look.operands[1])
    freq = np.linspace(0.1, 1, 8).astype(np.float32)
    table = run_value(look.operands[1], {"inv_freq": freq})
    np.testing.assert_array_equal(table, np.cos(np.arange(64, dtype=np.float32)[:, None] * freq))
    # Nothing is left in the step but the look-up and the product.
    assert [op.name for op in ops if not is_weight_expr(op.results[0])] == ["nn.embedding", "t.mul"]
    case.check_same()


def test_learned_positions_with_an_offset_lose_it() -> None:
    """OPT's positions start at row 2; its table has just as many rows as there are positions."""
    case = func(
        """  %w = param(name="wpe") : f32[62, 8]
  %two = t.const(value=2, dtype=i32) : i32[]
  %p = t.add(%pos, %two) : i32[N]
  %e = nn.embedding(%p, %w) : f32[N, 8]
  %y = t.add(%x, %e) : f32[N, 8]
  return %y""",
        "f32[N, 8]",
    ).run("tabulate-positions")
    (look,) = [op for op in case.after.func("f").ops if op.name == "nn.embedding" and op.operands[0].name == "pos"]
    assert look.operands[1].shape[0] == 60
    rng = np.random.default_rng(0)
    inputs = {
        "pos": np.array([0, 59, 7], np.int32),
        "x": np.zeros((3, 8), np.float32),
        "table": np.zeros((1, 4), np.int32),
    }
    params = {"wpe": rng.standard_normal((62, 8)).astype(np.float32)}
    (got,) = run(case.after, "f", inputs, params)
    np.testing.assert_array_equal(got, params["wpe"][[2, 61, 9]])


def test_scales_per_token_and_shapes_with_more_axes() -> None:
    case = func(
        """  %c = t.cast(%pos, dtype=f32) : f32[N]
  %l = t.exp(%c) : f32[N]
  %s = t.reshape(%l, shape=[N, 1, 1]) : f32[N, 1, 1]
  %r = t.rsqrt(%s) : f32[N, 1, 1]
  %y = t.mul(%r, %z) : f32[N, 2, 4]
  return %y""",
        "f32[N, 2, 4]",
        "%pos: i32[N] in [0, 63], %table: i32[B, 4], %z: f32[N, 2, 4]",
    ).run("tabulate-positions")
    assert [op.name for op in case.after.func("f").ops if not is_weight_expr(op.results[0])] == [
        "nn.embedding",
        "t.reshape",
        "t.mul",
    ]
    case.check_same()
