"""quantize-rows: linear layers on quantized weights take quantized activations too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from xllm_compiler.ir.core import Func, Value
from xllm_compiler.ir.ops import Dequantize, Linear, LinearGlu, QuantLinear, QuantLinearGlu, QuantRows
from xllm_compiler.ir.rewrite import Rewriter, apply_rules, rule
from xllm_compiler.passes.base import FuncPass, PassContext
from xllm_compiler.passes.registry import register_pass
from xllm_compiler.weight_formats import parse_format


@register_pass("quantize-rows")
@dataclass(frozen=True)
class QuantizeRows(FuncPass):
    """Rounds each row of a layer's input to 8 bits, so that integers are multiplied and their sums are exact.

    before:  %w = quant.dequantize(%stored, %scales, format="q8") : bf16[64, 32]
             %y = nn.linear(%x, %w) : bf16[N, 64]
    after:   %rows, %s, %t = quant.rows(%x) : i8[N, 32], f32[N], i32[N, 1]
             %y = quant.linear(%rows, %s, %t, %stored, %scales, format="q8") : bf16[N, 64]

    Layers that read the same input each get rows of their own; cse makes them one. Where the weight was rotated before
    it was rounded, so is the row. The weight's format says whether a row has one scale or one for each group. Rows stay
    as they are if the format is multiplied by no integers.
    """

    @property
    def loss(self) -> float:
        """Steps of 1/127 of the largest value of a row, which is some three times its RMS."""
        return 0.01

    def run_on(self, func: Func, ctx: PassContext) -> bool:
        return apply_rules(func, [integer_linear, integer_glu], self.name, ctx).changed


@rule(Linear)
def integer_linear(op: Linear, rw: Rewriter) -> bool:
    if op.partial or not (made := _operands(op.x, op.w, rw)):  # rows of a partial sum are scaled by what one rank sees
        return False
    operands, fields = made
    rw.replace(op, rw.create(QuantLinear, *operands, **fields, bias=op.bias, residual=op.residual, act=op.act))
    return True


@rule(LinearGlu)
def integer_glu(op: LinearGlu, rw: Rewriter) -> bool:
    if not (made := _operands(op.x, op.w, rw)):
        return False
    operands, fields = made
    rw.replace(op, rw.create(QuantLinearGlu, *operands, **fields, bias=op.bias, act=op.act))
    return True


def _operands(x: Value, w: Value, rw: Rewriter) -> tuple[tuple[Value, ...], dict[str, Any]] | None:
    """What an integer layer takes instead of `x` and `w`; None where it cannot be one."""
    op = w.op
    if not isinstance(op, Dequantize):
        return None
    form = parse_format(op.format).rows
    if form is None:
        return None
    fields: dict[str, Any] = {"group": form.group, "by_group": form.by_group, "rotate": op.rotate}
    rows = rw.create(QuantRows, x, **fields, hint=("rows", "row_scale", "row_sums"))
    return (*rows.results, op.values, op.scales), {"zeros": op.zeros, "format": op.format, "dtype": x.dtype}
