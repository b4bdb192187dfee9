"""Collectives: a start that yields a future, and the wait for it. Owns their rules; running ranks is interp's."""

from __future__ import annotations

from typing import Literal

import numpy as np

from xllm_compiler.ir.core import Op
from xllm_compiler.ir.diag import IrError
from xllm_compiler.ir.opdef import Group, Operand, op
from xllm_compiler.ir.semantics import Array, EvalContext
from xllm_compiler.ir.types import Future, Tensor, Type


@op("comm.all_reduce_start", effects=("comm",))
class AllReduceStart(Op):
    """f = the promise of x combined over all ranks of `group`; the sum of a partial sum is whole again."""

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

    f: Operand

    def infer(self) -> tuple[Type, ...]:
        return (self.f.future.of,)

    def interp(self, ctx: EvalContext, f: Array) -> Array:
        return f
