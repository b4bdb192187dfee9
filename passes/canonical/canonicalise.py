"""canonicalise: one form for what models spell out by hand. The rules stand in the files beside this one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

from xllm_compiler.ir.core import Func
from xllm_compiler.ir.rewrite import Rule, apply_rules
from xllm_compiler.passes.base import FuncPass, PassContext
from xllm_compiler.passes.canonical import activations, norms, rotary, rows
from xllm_compiler.passes.canonical.heads import unrepeat_heads
from xllm_compiler.passes.registry import register_pass

RULES: Final[tuple[Rule, ...]] = (*norms.RULES, *rotary.RULES, *activations.RULES, *rows.RULES)
# Powers become products, and rows are taken in the middle of things, only when no rule needs to see them whole.
LATE_RULES: Final[tuple[Rule, ...]] = (*activations.LATE_RULES, *rows.LATE_RULES)


@register_pass("canonicalise")
@dataclass(frozen=True)
class Canonicalise(FuncPass):
    """Recovers norms, rotary embeddings, activations and grouped queries.

    before:  %p = t.mul(%x, %x) : f32[N, 64]                           after:  %y = nn.rms_norm(%x, w=%w, eps=1e-06)
             %m = t.reduce(%p, kind=mean, axes=[1], keep=true) : f32[N, 1]
             %a = t.add(%m, %eps) : f32[N, 1]
             %r = t.rsqrt(%a) : f32[N, 1]
             %n = t.mul(%x, %r) : f32[N, 64]
             %y = t.mul(%w, %n) : f32[N, 64]

    Where a model computes in f32 between casts, the casts go: the ops compute in f32 and round once at the end.
    A cache whose heads are repeated before they are written keeps one of each: its argument has another type then.
    """

    changes_signature: ClassVar[bool] = True

    def run_on(self, func: Func, ctx: PassContext) -> bool:
        heads = unrepeat_heads(func)
        if heads:
            ctx.stat("unrepeated-heads", heads)
        early = apply_rules(func, RULES, self.name, ctx).changed
        late = apply_rules(func, LATE_RULES, self.name, ctx).changed
        return bool(heads) or early or late
