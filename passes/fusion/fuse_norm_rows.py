"""fuse-norm-rows: a norm whose rows are only quantized does that too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from xllm_compiler.ir.core import Func, Op
from xllm_compiler.ir.ops import LayerNorm, QuantNormRows, QuantRows, RmsNorm
from xllm_compiler.ir.rewrite import Rewriter, apply_rules, rule
from xllm_compiler.passes.base import FuncPass, PassContext
from xllm_compiler.passes.registry import register_pass


@register_pass("fuse-norm-rows")
@dataclass(frozen=True)
class FuseNormRows(FuncPass):
    """Quantizes a row where it has just been normalised, so that it is not written, waited for and read in between.

    before:  %y = nn.rms_norm(%x, w=%w, eps=1e-06) : bf16[N, 64]
             %rows, %s, %t = quant.rows(%y)        : i8[N, 64], f32[N], i32[N, 1]
    after:   %rows, %s, %t = quant.norm_rows(%x, w=%w, eps=1e-06) : i8[N, 64], f32[N], i32[N, 1]

    The same for nn.layer_norm, and for rows that are rotated. A norm with another reader stays, as does one whose rows
    are quantized in two ways, such as for weights of different groups: it would be computed twice.
    """

    def run_on(self, func: Func, ctx: PassContext) -> bool:
        return apply_rules(func, [norm_rows], self.name, ctx).changed


@rule(RmsNorm, LayerNorm)
def norm_rows(op: Op, rw: Rewriter) -> bool:
    assert isinstance(op, RmsNorm | LayerNorm)
    readers = [user for user in op.result.users if isinstance(user, QuantRows)]
    if not readers:
        return False
    if len(readers) < len(op.result.uses):
        if rw.ctx is not None:
            rw.ctx.remark(op, "not fused with the quantization of its rows: others read them as they are")
        return False
    first = readers[0]
    if any(_form(user) != _form(first) for user in readers):
        if rw.ctx is not None:
            turned = any(user.rotate != first.rotate for user in readers)
            why = "rotated for some readers" if turned else "for weights of different groups"
            rw.ctx.remark(op, f"not fused with the quantization of its rows: they are {why}")
        return False
    fields: dict[str, Any] = {
        **_form(first),
        "hint": tuple(r.name for r in first.results),
    }
    if isinstance(op, RmsNorm):
        made = rw.create(QuantNormRows, op.x, w=op.w, eps=op.eps, offset=op.offset, **fields)
    else:
        made = rw.create(QuantNormRows, op.x, w=op.w, b=op.b, eps=op.eps, kind="layer", **fields)
    for user in readers:
        rw.replace(user, made)
    rw.erase(op)
    return True


def _form(rows: QuantRows) -> dict[str, Any]:
    return {"group": rows.group, "rotate": rows.rotate, "by_group": rows.by_group}
