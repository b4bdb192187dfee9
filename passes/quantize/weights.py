"""quantize-weights: weights of linear layers become small integers with scales (ir/quant rounds them)."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar

from xllm_compiler.analysis.weights import is_weight_expr, param_names, unrounded
from xllm_compiler.ir import quant
from xllm_compiler.ir.core import Builder, Func, Op, Value
from xllm_compiler.ir.ops import (
    AddRmsNorm,
    Dequantize,
    Embedding,
    Gelu,
    LayerNorm,
    Linear,
    LinearGlu,
    Mul,
    QuantWeight,
    Relu,
    RmsNorm,
    Rotate,
    Sigmoid,
    Silu,
    Tanh,
)
from xllm_compiler.passes.base import FuncPass, PassContext
from xllm_compiler.passes.registry import register_pass
from xllm_compiler.weight_formats import parse_format

ACTIVATIONS = (Gelu, Relu, Sigmoid, Silu, Tanh)
_RULE = "quantize-weights/quantize"


@register_pass("quantize-weights")
@dataclass(frozen=True)
class QuantizeWeights(FuncPass):
    """Rounds every weight that a linear layer reads, as it is stored, to the weight format `format`.

    before:  %y = nn.linear(%x, %w) : bf16[N, 64]
    after:   %stored, %scales = quant.weight(%w, format="q8") : u8[64, 32], f32[64, 1]
             %w_1 = quant.dequantize(%stored, %scales, format="q8") : bf16[64, 32]
             %y = nn.linear(%x, %w_1) : bf16[N, 64]

    A weight that is cast to a narrower float is read as it is before. A weight that an embedding reads too stays one; a
    table that was such a weight before rotate-stream is rounded too. `keep`: patterns of checkpoint names, separated by
    ":", whose layers stay as they are; `only`: patterns of those that are done at all. Weights that come quantized are
    left alone.
    `rotate`: rotates weights first (ir/quant.py) that are multiplied only by the results of gates, activations and
    norms with a weight. There single values are far larger than the others.
    """

    samples: ClassVar[tuple[str, ...]] = (
        "{format=q4g32}",
        "{format=q4g32z}",
        "{format=q4grid32}",
        "{rotate=true}",
    )

    format: str = "q8"
    rotate: bool = False
    keep: str = ""
    only: str = "*"

    def __post_init__(self) -> None:
        parse_format(self.format, "option")

    @property
    def loss(self) -> float:
        """What normally distributed weights lose."""
        return parse_format(self.format).error

    def run_on(self, func: Func, ctx: PassContext) -> bool:
        done = 0
        for w in (*layer_weights(func), *tied_tables(func)):
            names = param_names(w)
            if not _matches(names, self.only) or _matches(names, self.keep):
                ctx.remark(w.users[0], "its weight is kept as it is")
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
        form: dict[str, Any] = {"format": self.format, "rotate": rotation_of(w) if self.rotate else 0}
        made = b.create(QuantWeight, unrounded(w), **form)
        zeros = made.results[2] if len(made.results) == 3 else None
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


def tied_tables(func: Func) -> dict[Value, Value]:
    """Rotated tables that are looked up in, each with a layer's weight of the same parameters: the two were one before
    rotate-stream."""
    layers = {w: set(param_names(w)) for w in layer_weights(func)}
    found: dict[Value, Value] = {}
    for op in func.ops:
        if isinstance(op, Embedding) and op.w not in found and isinstance(unrounded(op.w).op, Rotate):
            names = set(param_names(op.w))
            layer = next((w for w, each in layers.items() if names <= each), None)
            if layer is not None:
                found[op.w] = layer
    return found


def rotation_of(w: Value) -> int:
    """The blocks in which a weight is rotated where that pays; 0: it does not. The products of a gate, what comes out
    of an activation and what a norm with a weight makes have a few values much larger than the rest. After
    rotate-stream norms have none, and make no such values."""
    layers = [user for user in w.users if not (isinstance(user, Embedding) and w is user.w)]  # rotates rows back
    uneven = all(isinstance(user, (Linear, LinearGlu)) and w is user.w and _is_uneven(user.x) for user in layers)
    return quant.rotation(w.shape[1].value) if layers and uneven and w.shape[1].is_const else 0


def _is_uneven(x: Value) -> bool:
    op = x.op
    if isinstance(op, Mul):
        return any(isinstance(v.op, ACTIVATIONS) for v in op.operands)
    if isinstance(op, (RmsNorm, LayerNorm, AddRmsNorm)):
        return op.w is not None
    return isinstance(op, (LinearGlu, *ACTIVATIONS)) or (isinstance(op, Linear) and op.act != "none")


def _matches(names: list[str], patterns: str) -> bool:
    return any(fnmatchcase(name, p) for p in patterns.split(":") if p for name in names)
