"""quantize-rows: linear layers on quantized weights take quantized activations too. Owns that rule only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from xllm_compiler.ir import quant
from xllm_compiler.ir.core import Func, Value
from xllm_compiler.ir.ops import Dequantize, Linear, LinearGlu, QuantLinear, QuantLinearGlu, QuantRows
from xllm_compiler.ir.rewrite import Rewriter, apply_rules, rule
from xllm_compiler.passes.base import FuncPass, PassContext
from xllm_compiler.passes.registry import register_pass


@register_pass("quantize-rows")
@dataclass(frozen=True)
class QuantizeRows(FuncPass):
    """Rounds each row of a layer's input to 8 bits, so that integers are multiplied and their sums are exact.

    before:  %w = quant.dequantize(%stored, %scales, bits=8) : bf16[64, 32]
             %y = nn.linear(%x, %w) : bf16[N, 64]
    after:   %rows, %s, %t = quant.rows(%x) : i8[N, 32], f32[N], i32[N, 1]
             %y = quant.linear(%rows, %s, %t, %stored, %scales, bits=8) : bf16[N, 64]

    Layers that read the same input each get rows of their own; cse makes them one. Where the weight was rotated before
    it was rounded, so is the row. Before 8-bit weights in groups a row has a scale for each group.
    """

    @property
    def loss(self) -> float:
        """Steps of 1/127 of the largest value of a row, which is some three times its RMS."""
        return 0.01

    def run_on(self, func: Func, ctx: PassContext) -> bool:
        return apply_rules(func, [integer_linear, integer_glu], self.name, ctx).changed


@rule(Linear)
def integer_linear(op: Linear, rw: Rewriter) -> bool:
    w = op.w.op
    if not isinstance(w, Dequantize) or op.partial:  # a partial sum's rows are scaled by what only this rank sees
        return False
    fields: dict[str, Any] = {"bias": op.bias, "residual": op.residual, "act": op.act}
    rw.replace(op, rw.create(QuantLinear, *_operands(op.x, w, rw), **_form(op.x, w), **fields))
    return True


@rule(LinearGlu)
def integer_glu(op: LinearGlu, rw: Rewriter) -> bool:
    w = op.w.op
    if not isinstance(w, Dequantize):
        return False
    made = rw.create(QuantLinearGlu, *_operands(op.x, w, rw), **_form(op.x, w), bias=op.bias, act=op.act)
    rw.replace(op, made)
    return True


def _operands(x: Value, w: Dequantize, rw: Rewriter) -> tuple[Value, ...]:
    form: dict[str, Any] = {"group": w.group, "rotate": w.rotate, "by_group": quant.rows_by_group(w.bits, w.group)}
    rows = rw.create(QuantRows, x, **form, hint=("rows", "row_scale", "row_sums"))
    return (*rows.results, w.values, w.scales)


def _form(x: Value, w: Dequantize) -> dict[str, Any]:
    return {"zeros": w.zeros, "bits": w.bits, "group": w.group, "grid": w.grid, "dtype": x.dtype}
