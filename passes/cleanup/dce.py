"""dce: removes what nobody uses."""

from __future__ import annotations

from dataclasses import dataclass

from xllm_compiler.ir.core import Func
from xllm_compiler.passes.base import FuncPass, PassContext
from xllm_compiler.passes.registry import register_pass


@register_pass("dce")
@dataclass(frozen=True)
class Dce(FuncPass):
    """Erases pure ops whose results have no use, parameters included.

    before:  %w = param(name="w") : f32[8]      after:  return %x
             %y = t.mul(%x, %w) : f32[N, 8]
             return %x

    Ops with effects stay. A `kv.write` is pure: a cache version that is neither read nor returned is dead.
    """

    def run_on(self, func: Func, ctx: PassContext) -> bool:
        erased = 0
        for op in reversed(func.ops):  # users stand after what they use, so one sweep finds whole dead chains
            if op.SPEC.pure and not any(r.has_uses for r in op.results) and ctx.allows("dce/erase", op):
                op.erase()
                ctx.tried("dce/erase", op, fired=True)
                erased += 1
        if erased:
            ctx.stat("erased", erased)
        return erased > 0
