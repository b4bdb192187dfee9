"""Ops on cells. Owns their shape rules and reference meanings; a cell is a state, one version after the other.

Row b of the step belongs to slot slot[b] of the cell.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from xllm_compiler.dims import Dim
from xllm_compiler.ir.core import Op, Value
from xllm_compiler.ir.cost import Cost, CostContext
from xllm_compiler.ir.diag import IrError
from xllm_compiler.ir.facts import Noise, Work
from xllm_compiler.ir.opdef import Operand, op
from xllm_compiler.ir.rows import ThroughState
from xllm_compiler.ir.semantics import Array, EvalContext, cell_slots
from xllm_compiler.ir.shapes import no_partial, require_le, require_shape
from xllm_compiler.ir.types import Tensor, Type


def _rows(op: Op, slot: Value) -> Dim:
    """How many slots are named."""
    if slot.dtype != "i32" or slot.tensor.rank != 1:
        raise IrError(f"{op.name} needs slots i32[B], %{slot.name} is {slot.type}")
    return slot.shape[0]


@op("state.read")
class StateRead(Op):
    """y[b] = cell[slot[b]]."""

    rows = ThroughState()
    noise = Noise.MOVES
    work = Work.COPY
    cell: Operand
    slot: Operand

    def infer(self) -> tuple[Type, ...]:
        no_partial(self)
        cell = self.cell.cell
        return (Tensor(cell.dtype, [_rows(self, self.slot), *cell.shape]),)

    def cost(self, ctx: CostContext) -> Cost:
        cost = ctx.count(self, flops=0)
        return replace(cost, read=cost.read + self.slot.shape[0] * self.cell.cell.block_bytes)

    def interp(self, ctx: EvalContext, cell: Array, slot: Array) -> Array:
        return np.asarray(cell[cell_slots(slot, len(cell))])


@op("state.write", consumes="cell")
class StateWrite(Op):
    """cell' = cell with cell'[slot[b]] = x[b]. No slot is named twice, so there are as many slots as rows or more."""

    rows = ThroughState()
    noise = Noise.MOVES
    work = Work.COPY
    cell: Operand
    x: Operand
    slot: Operand

    def infer(self) -> tuple[Type, ...]:
        no_partial(self)
        cell, rows = self.cell.cell, _rows(self, self.slot)
        if self.x.dtype != cell.dtype:
            raise IrError(
                f"state.write: %{self.x.name} is {self.x.type}, the cell holds {cell.dtype}", help="t.cast it"
            )
        require_shape(self.scope, self.x.shape, [rows, *cell.shape], "state.write: x")
        require_le(self.scope, rows, cell.slots, "state.write: a slot for every row")
        return (cell,)

    def cost(self, ctx: CostContext) -> Cost:
        cost = ctx.count(self, flops=0)
        return replace(cost, written=cost.written + self.slot.shape[0] * self.cell.cell.block_bytes)

    def interp(self, ctx: EvalContext, cell: Array, x: Array, slot: Array) -> Array:
        at = cell_slots(slot, len(cell))
        if len(np.unique(at)) < len(at):
            raise IrError("state.write: two rows name one slot", help="every row has a slot of its own")
        out = cell.copy()
        out[at] = x.astype(cell.dtype, copy=False)
        return out

    def default_hint(self, index: int) -> str:
        return "cell"
