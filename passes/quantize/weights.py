"""quantize-weights: weights of linear layers become small integers with scales. Owns which ones; not how (ir/quant)."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar

from xllm_compiler.analysis.weights import is_weight_expr, param_names
from xllm_compiler.errors import XllmError
from xllm_compiler.ir.core import Builder, Func, Op, Value
from xllm_compiler.ir.ops import Dequantize, Linear, LinearGlu, QuantWeight
from xllm_compiler.passes.base import FuncPass, PassContext
from xllm_compiler.passes.registry import register_pass

_RULE = "quantize-weights/quantize"


@register_pass("quantize-weights")
@dataclass(frozen=True)
class QuantizeWeights(FuncPass):
    """Rounds every weight that a linear layer reads, as it is stored, to `bits` bits with a scale per `group` values.

    before:  %y = nn.linear(%x, %w) : bf16[N, 64]
    after:   %stored, %scales = quant.weight(%w, bits=8) : u8[64, 32], f32[64, 1]
             %w_1 = quant.dequantize(%stored, %scales, bits=8) : bf16[64, 32]
             %y = nn.linear(%x, %w_1) : bf16[N, 64]

    A weight that an embedding reads too stays one. `keep`: patterns of checkpoint names, separated by ":", whose layers
    stay as they are; `only`: patterns of those that are done at all. Weights that come quantized are left alone.
    """

    samples: ClassVar[tuple[str, ...]] = ("{bits=4,group=32}", "{bits=4,group=32,zeros=true}")

    bits: int = 8
    group: int = 0
    zeros: bool = False
    keep: str = ""
    only: str = "*"

    @property
    def loss(self) -> float:
        """What normally distributed weights lose, rounded up; 4 bits lose more the longer a group is."""
        if self.bits != 4:
            return 0.01
        return 0.12 if 0 < self.group <= 128 else 0.2

    def run_on(self, func: Func, ctx: PassContext) -> bool:
        if self.bits not in (4, 8) or self.group < 0 or self.group % 16:
            raise XllmError(
                "option",
                f"weights of {self.bits} bits in groups of {self.group}",
                help="bits: 4 or 8; group: 16 * n, or 0",
            )
        done = 0
        for w, layer in layer_weights(func).items():
            names = param_names(w)
            if not _matches(names, self.only) or _matches(names, self.keep):
                ctx.remark(layer, "its weight is kept as it is")
                continue
            assert w.op is not None
            if ctx.allows(_RULE, w.op):
                self._quantize(w, w.op)
                ctx.tried(_RULE, w.op, True)
                done += 1
        if done:
            ctx.stat("weights", done)
        return bool(done)

    def _quantize(self, w: Value, op: Op) -> None:
        users = w.uses
        b = Builder.after(op, op.loc.touched_by(_RULE))
        made = b.create(QuantWeight, w, bits=self.bits, group=self.group, zeros=self.zeros)
        zeros = made.results[2] if self.zeros else None
        back = b.create(
            Dequantize, *made.results[:2], zeros=zeros, bits=self.bits, group=self.group, dtype=w.dtype, hint=w.name
        ).result
        for user, index in users:
            user.set_operand(index, back)


def layer_weights(func: Func) -> dict[Value, Linear | LinearGlu]:
    """The weights that quantize-weights may do, each with the first layer that reads it, in order."""
    found: dict[Value, Linear | LinearGlu] = {}
    for op in func.ops:
        if isinstance(op, (Linear, LinearGlu)) and not (isinstance(op, Linear) and op.partial):
            w = op.w
            if w not in found and is_weight_expr(w) and not isinstance(w.op, Dequantize):
                found[w] = op
    return found


def _matches(names: list[str], patterns: str) -> bool:
    return any(fnmatchcase(name, p) for p in patterns.split(":") if p for name in names)
