"""Idioms of what a row carries from step to step in a slot of a cell. Attention and its caches are model.py's."""

from __future__ import annotations

from xllm_compiler.ir import ops
from xllm_compiler.testing.idioms.tensor import an_int, numbers
from xllm_compiler.testing.sketch import POSITIONS, Sketch


def recurrent(g: Sketch) -> None:
    """A state decays and takes up the row. Sometimes the version before is read once more, sometimes the one after."""
    name, slot = g.cell("cell0", g.dtype, (g.width,)), g.arg("slot")
    before = g.states[name]
    decayed = g.op(ops.Mul, g.op(ops.StateRead, before, slot), g.const(0.5))
    new = g.settle(g.op(ops.Add, decayed, g.back()))
    match g.choose(3):
        case 0:
            g.push(g.op(ops.Add, new, g.op(ops.StateRead, before, slot)))
        case 1:
            g.push(new)
        case _:
            pass
    g.states[name] = g.op(ops.StateWrite, before, new, slot)
    g.push(g.op(ops.StateRead, g.states[name], slot))


def remembered(g: Sketch) -> None:
    """The integer of the step before, and this step's for the next one."""
    name, slot = g.cell("cell1", "i32", ()), g.arg("slot")
    before = g.states[name]
    now = an_int(g)
    g.ints.append(g.op(ops.Mod, g.op(ops.StateRead, before, slot), g.const(POSITIONS, "i32")))
    g.states[name] = g.op(ops.StateWrite, before, now, slot)
    numbers(g)
