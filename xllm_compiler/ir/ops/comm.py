"""Collectives: a start that yields a future, and the wait for it. Owns their rules; running ranks is interp's."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np

from xllm_compiler.ir.core import Op
from xllm_compiler.ir.cost import Cost, CostContext
from xllm_compiler.ir.diag import IrError
from xllm_compiler.ir.facts import Noise, Work
from xllm_compiler.ir.opdef import Group, Operand, op
from xllm_compiler.ir.rows import SameAxes
from xllm_compiler.ir.semantics import Array, EvalContext
from xllm_compiler.ir.types import Future, Tensor, Type


@op("comm.all_reduce_start", effects=("comm",))
class AllReduceStart(Op):
    """f = the promise of x combined over all ranks of `group`; the sum of a partial sum is whole again."""

    rows = SameAxes()
    noise = Noise.ROUNDS
    work = Work.LIGHT
    x: Operand
    group: Group
    kind: Literal["sum", "max"] = "sum"

    def infer(self) -> tuple[Type, ...]:
        x = self.x.tensor
        if self.group not in self.func.module.groups:
            raise IrError(f"comm.all_reduce_start over @{self.group}, which the module does not declare")
        if x.partial is not None and (x.partial != self.group or self.kind != "sum"):
            raise IrError(f"{x} is completed by the sum over @{x.partial}, not by the {self.kind} over @{self.group}")
        return (Future(Tensor(x.dtype, x.shape)),)

    def cost(self, ctx: CostContext) -> Cost:
        """A ring over R ranks sends 2 * (R - 1) / R of the bytes per rank in 2 * (R - 1) hops (Patarasuk and Yuan, JPDC
        69(2), 2009)."""
        x, ranks = self.x.tensor, self.func.module.groups[self.group]
        cost = ctx.count(self, flops=x.elements * (ranks - 1))
        hops = 2 * (ranks - 1)
        return replace(cost, written=x.nbytes, comm=hops * x.nbytes // ranks, hops=hops)

    def interp_ranks(self, ctx: EvalContext, xs: list[Array]) -> Array:
        """The combination of what the ranks hold, in rank order."""
        total = ctx.up(xs[0])
        for x in xs[1:]:
            total = np.add(total, ctx.up(x)) if self.kind == "sum" else np.maximum(total, ctx.up(x))
        return total

    def interp(self, ctx: EvalContext, x: Array) -> Array:
        return self.interp_ranks(ctx, [x])

    def default_hint(self, index: int) -> str:
        return "f"


@op("comm.wait", effects=("comm",))
class Wait(Op):
    """y = what the future f promised."""

    rows = SameAxes()
    noise = Noise.MOVES
    work = Work.NONE
    f: Operand

    def infer(self) -> tuple[Type, ...]:
        return (self.f.future.of,)

    def interp(self, ctx: EvalContext, f: Array) -> Array:
        return f
