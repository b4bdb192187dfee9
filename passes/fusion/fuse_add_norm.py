"""fuse-add-norm: a sum and the RMS norm that reads it in one kernel."""

from __future__ import annotations

from dataclasses import dataclass

from xllm_compiler.analysis.weights import is_weight_expr
from xllm_compiler.ir.core import Func
from xllm_compiler.ir.ops import Add, AddRmsNorm, RmsNorm
from xllm_compiler.ir.rewrite import Rewriter, apply_rules, rule
from xllm_compiler.passes.base import FuncPass, PassContext
from xllm_compiler.passes.fusion.match import hoist
from xllm_compiler.passes.registry import register_pass


@register_pass("fuse-add-norm")
@dataclass(frozen=True)
class FuseAddNorm(FuncPass):
    """Computes a residual sum while its norm reads it.

    before:  %s = t.add(%x, %res)                    : bf16[N, 64]
             %y = nn.rms_norm(%s, w=%w, eps=1e-06)   : bf16[N, 64]
    after:   %y, %s = nn.add_rms_norm(%x, %res, %w, eps=1e-06) : bf16[N, 64], bf16[N, 64]

    The sum may have other users. A sum that broadcasts, a norm without weight, and the second norm of one sum stay.
    """

    def run_on(self, func: Func, ctx: PassContext) -> bool:
        return apply_rules(func, [add_norm], self.name, ctx).changed


@rule(RmsNorm)
def add_norm(op: RmsNorm, rw: Rewriter) -> bool:
    add = op.x.op
    if not isinstance(add, Add) or op.w is None or not is_weight_expr(op.w):
        return False
    if add.a.type != add.result.type or add.b.type != add.result.type or add.result.tensor.partial is not None:
        return False
    hoist([op.w], add)
    rw.before(add)  # users of the sum may stand before the norm
    fused = rw.create(
        AddRmsNorm, add.a, add.b, op.w, eps=op.eps, offset=op.offset, hint=(op.result.name, add.result.name)
    )
    rw.replace(op, fused.results[0])
    rw.replace(add, fused.results[1])
    return True
