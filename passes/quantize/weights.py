"""quantize-weights: weights of linear layers become small integers with scales. Owns which ones; not how (ir/quant)."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar

from xllm_compiler.analysis.weights import is_weight_expr, param_names
from xllm_compiler.errors import XllmError
from xllm_compiler.ir import quant
from xllm_compiler.ir.core import Builder, Func, Op, Value
from xllm_compiler.ir.ops import (
    Dequantize,
    Gelu,
    Linear,
    LinearGlu,
    Mul,
    QuantWeight,
    Relu,
    Sigmoid,
    Silu,
    Tanh,
)
from xllm_compiler.passes.base import FuncPass, PassContext
from xllm_compiler.passes.registry import register_pass

ACTIVATIONS = (Gelu, Relu, Sigmoid, Silu, Tanh)
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
    `grid`, of 4 bits: a scale per row, and every so many values on a grid of 16 numbers; the integers are then bytes.
    `rotate`: weights that meet only what comes out of a gate or an activation, where single values are far larger than
    the others, are rotated first (ir/quant.py has both).
    """

    samples: ClassVar[tuple[str, ...]] = (
        "{bits=4,group=32}",
        "{bits=4,group=32,zeros=true}",
        "{bits=4,grid=32}",
        "{rotate=true}",
    )

    bits: int = 8
    group: int = 0
    grid: int = 0
    zeros: bool = False
    rotate: bool = False
    keep: str = ""
    only: str = "*"

    @property
    def loss(self) -> float:
        """What normally distributed weights lose, rounded up; 4 bits lose more the longer a group is."""
        if self.bits != 4:
            return 0.01
        return 0.12 if self.grid or 0 < self.group <= 128 else 0.2

    def run_on(self, func: Func, ctx: PassContext) -> bool:
        if self.bits not in (4, 8) or self.group < 0 or self.group % 16:
            raise XllmError(
                "option",
                f"weights of {self.bits} bits in groups of {self.group}",
                help="bits: 4 or 8; group: 16 * n, or 0",
            )
        if self.grid and (self.grid not in quant.GRIDS or self.bits != 4 or self.group or self.zeros):
            raise XllmError(
                "option",
                f"weights of {self.bits} bits on grids of {self.grid}",
                help=f"grid: {' or '.join(map(str, quant.GRIDS))}, with 4 bits and neither group nor zeros",
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
        form: dict[str, Any] = {"bits": 8 if self.grid else self.bits, "group": self.group, "grid": self.grid}
        form["rotate"] = rotation_of(w) if self.rotate else 0
        made = b.create(QuantWeight, w, zeros=self.zeros, **form)
        zeros = made.results[2] if self.zeros else None
        back = b.create(Dequantize, *made.results[:2], zeros=zeros, dtype=w.dtype, hint=w.name, **form).result
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


def rotation_of(w: Value) -> int:
    """The blocks in which a weight is rotated where that pays; 0: it does not. The products of a gate, and what comes
    out of an activation, have a few values much larger than the rest; what a norm has made has not."""
    hidden = all(isinstance(user, (Linear, LinearGlu)) and w is user.w and _is_hidden(user.x) for user in w.users)
    return quant.rotation(w.shape[1].value) if hidden and w.shape[1].is_const else 0


def _is_hidden(x: Value) -> bool:
    op = x.op
    if isinstance(op, Mul):
        return any(isinstance(v.op, ACTIVATIONS) for v in op.operands)
    return isinstance(op, (LinearGlu, *ACTIVATIONS)) or (isinstance(op, Linear) and op.act != "none")


def _matches(names: list[str], patterns: str) -> bool:
    return any(fnmatchcase(name, p) for p in patterns.split(":") if p for name in names)
