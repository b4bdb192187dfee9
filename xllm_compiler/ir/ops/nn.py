"""Neural-network ops: what models are canonicalised to. Owns their shape rules and reference meanings.

Every op computes in f32 and rounds once, at its results.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np

from xllm_compiler.dims import Dim, as_dim, ceildiv
from xllm_compiler.ir.core import Op, Value
from xllm_compiler.ir.cost import Cost, CostContext
from xllm_compiler.ir.diag import IrError
from xllm_compiler.ir.facts import Noise, Work
from xllm_compiler.ir.opdef import Group, Operand, OptOperand, op
from xllm_compiler.ir.ops.tensor import check_range
from xllm_compiler.ir.rows import FirstAxis, Gathered, LastAxis
from xllm_compiler.ir.semantics import Array, EvalContext, activation, layer_norm, rms_norm, rope
from xllm_compiler.ir.shapes import (
    broadcast,
    no_partial,
    require_float,
    require_int,
    require_le,
    require_rank,
    require_same_dim,
    require_shape,
)
from xllm_compiler.ir.types import Tensor, Type

Activation = Literal["none", "silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid", "tanh"]


@op("nn.embedding", gathers="w")
class Embedding(Op):
    """y[.., :] = w[ids[..], :]."""

    rows = Gathered()
    noise = Noise.MOVES
    work = Work.COPY
    ids: Operand
    w: Operand

    def infer(self) -> tuple[Type, ...]:
        no_partial(self)
        require_int(self, self.ids)
        require_rank(self, self.w, 2)
        return (self.w.tensor.with_(shape=(*self.ids.shape, self.w.shape[1])),)

    def cost(self, ctx: CostContext) -> Cost:
        cost, taken = ctx.count(self, flops=0), self.result.tensor
        made = ctx.narrow(self.w)
        if made is None:
            return cost
        stored = self.ids.tensor.elements * made.stored_row_bytes()
        return replace(cost, weights=cost.weights - taken.nbytes + stored, flops=2 * taken.elements)

    def interp(self, ctx: EvalContext, ids: Array, w: Array) -> Array:
        check_range(self, ids, w.shape[0])
        return np.take(w, ids, axis=0)


def _check_linear(op: Op, x: Value, w: Value, bias: Value | None) -> None:
    require_float(op, x, w, bias)
    require_rank(op, w, 2)
    if x.tensor.rank < 1 or x.dtype != w.dtype:
        raise IrError(f"{op.name} of {x.type} with weight {w.type}: dtypes must be equal", help="insert t.cast")
    require_same_dim(op.scope, x.shape[-1], w.shape[1], f"{op.name} contracts {x.type} with {w.type}")
    if bias is not None:
        require_shape(op.scope, bias.shape, [w.shape[0]], f"{op.name}: bias %{bias.name}")


@op("nn.linear")
class Linear(Op):
    """y = act(x @ w.T + bias) + residual; w is [out, in]. f32 accumulation, one rounding at the end.

    With `partial` the columns of w are this rank's share of the contraction, and y is a partial sum over that group, in
    f32 (f64 where x is) whatever the dtype of x.
    """

    rows = LastAxis("residual")
    noise = Noise.ROUNDS
    work = Work.DOT
    x: Operand
    w: Operand
    bias: OptOperand
    residual: OptOperand
    act: Activation = "none"
    partial: Group = ""

    def infer(self) -> tuple[Type, ...]:
        no_partial(self)
        x = self.x.tensor
        _check_linear(self, self.x, self.w, self.bias)
        shape = (*x.shape[:-1], self.w.shape[0])
        if self.residual is not None:
            if self.residual.dtype != x.dtype:
                raise IrError(f"nn.linear: residual is {self.residual.type}, the result is {x.dtype}")
            require_shape(self.scope, self.residual.shape, shape, f"nn.linear: residual %{self.residual.name}")
        if self.partial and self.partial not in self.func.module.groups:
            raise IrError(f"nn.linear: partial sum over @{self.partial}, which the module does not declare")
        if self.partial and (self.bias is not None or self.residual is not None or self.act != "none"):
            raise IrError("nn.linear: a partial sum takes no bias, activation or residual before its all-reduce")
        if self.partial:
            return (Tensor("f64" if x.dtype == "f64" else "f32", shape, self.partial),)
        return (Tensor(x.dtype, shape),)

    def cost(self, ctx: CostContext) -> Cost:
        out = self.result.tensor.elements
        extras = sum((self.bias is not None, self.residual is not None, self.act != "none"))
        return ctx.widened(ctx.count(self, flops=2 * out * self.w.shape[1] + extras * out), self.w)

    def interp(self, ctx: EvalContext, x: Array, w: Array, bias: Array | None, residual: Array | None) -> Array:
        y = np.asarray(np.matmul(ctx.up(x), ctx.up(w).T))
        if bias is not None:
            y = y + ctx.up(bias)
        y = activation(self.act, y)
        return y if residual is None else y + ctx.up(residual)


@op("nn.linear_glu")
class LinearGlu(Op):
    """y = act(x @ g.T + bias_g) * (x @ u.T + bias_u), where w [2 * F, in] holds the rows of g, then those of u."""

    rows = LastAxis()
    noise = Noise.ROUNDS
    work = Work.DOT
    x: Operand
    w: Operand
    bias: OptOperand
    act: Activation = "silu"

    def infer(self) -> tuple[Type, ...]:
        no_partial(self)
        x = self.x.tensor
        _check_linear(self, self.x, self.w, self.bias)
        half = self.w.shape[0] // 2
        require_same_dim(self.scope, 2 * half, self.w.shape[0], "nn.linear_glu: rows of w in two halves")
        return (x.with_(shape=(*x.shape[:-1], half)),)

    def cost(self, ctx: CostContext) -> Cost:
        out = self.result.tensor.elements
        extras = 2 + 2 * (self.bias is not None)  # activation and product, biases of both halves
        return ctx.widened(ctx.count(self, flops=4 * out * self.w.shape[1] + extras * out), self.w)

    def interp(self, ctx: EvalContext, x: Array, w: Array, bias: Array | None) -> Array:
        y = np.asarray(np.matmul(ctx.up(x), ctx.up(w).T))
        if bias is not None:
            y = y + ctx.up(bias)
        half = y.shape[-1] // 2
        return np.asarray(activation(self.act, y[..., :half]) * y[..., half:])


def check_norm_vector(op: Op, x: Value, v: Value | None, what: str) -> None:
    """`x` has a last axis, and the vector `v`, if any, its length."""
    require_float(op, x, v)
    if x.tensor.rank < 1:
        raise IrError(f"{op.name} of a scalar")
    if v is not None:
        require_shape(op.scope, v.shape, [x.shape[-1]], f"{op.name}: {what} %{v.name}")


@op("nn.rms_norm")
class RmsNorm(Op):
    """y = x / sqrt(mean(x^2) + eps) * (w + offset) over the last axis, statistics in f32; without w no factor."""

    rows = LastAxis()
    noise = Noise.ROUNDS
    work = Work.HEAVY
    x: Operand
    w: OptOperand
    eps: float
    offset: float = 0.0

    def infer(self) -> tuple[Type, ...]:
        no_partial(self)
        check_norm_vector(self, self.x, self.w, "w")
        return (self.x.tensor,)

    def cost(self, ctx: CostContext) -> Cost:
        return ctx.count(self, flops=4 * self.x.tensor.elements)

    def interp(self, ctx: EvalContext, x: Array, w: Array | None) -> Array:
        return rms_norm(ctx.up(x), None if w is None else ctx.up(w), self.eps, self.offset)


@op("nn.layer_norm")
class LayerNorm(Op):
    """y = (x - mean) / sqrt(variance + eps) * w + b over the last axis, statistics in f32."""

    rows = LastAxis()
    noise = Noise.ROUNDS
    work = Work.HEAVY
    x: Operand
    w: OptOperand
    b: OptOperand
    eps: float

    def infer(self) -> tuple[Type, ...]:
        no_partial(self)
        check_norm_vector(self, self.x, self.w, "w")
        check_norm_vector(self, self.x, self.b, "b")
        return (self.x.tensor,)

    def cost(self, ctx: CostContext) -> Cost:
        return ctx.count(self, flops=7 * self.x.tensor.elements)

    def interp(self, ctx: EvalContext, x: Array, w: Array | None, b: Array | None) -> Array:
        return layer_norm(ctx.up(x), None if w is None else ctx.up(w), None if b is None else ctx.up(b), self.eps)


@op("nn.add_rms_norm")
class AddRmsNorm(Op):
    """sum = x + res, rounded to its dtype; y = rms_norm(sum, w). Results (y, sum)."""

    rows = LastAxis("res")
    noise = Noise.ROUNDS
    work = Work.HEAVY
    x: Operand
    res: Operand
    w: Operand
    eps: float
    offset: float = 0.0

    def infer(self) -> tuple[Type, ...]:
        no_partial(self)
        if self.x.dtype != self.res.dtype:
            raise IrError(f"nn.add_rms_norm of {self.x.type} and {self.res.type}: dtypes must be equal")
        require_shape(self.scope, self.res.shape, self.x.shape, f"nn.add_rms_norm: res %{self.res.name}")
        check_norm_vector(self, self.x, self.w, "w")
        return (self.x.tensor, self.x.tensor)

    def cost(self, ctx: CostContext) -> Cost:
        return ctx.count(self, flops=5 * self.x.tensor.elements)

    def interp(self, ctx: EvalContext, x: Array, res: Array, w: Array) -> tuple[Array, Array]:
        # The norm reads the rounded sum, as the unfused pair would.
        total = ctx.store(ctx.up(x) + ctx.up(res), self.x.type)
        return rms_norm(ctx.up(total), ctx.up(w), self.eps, self.offset), total

    def default_hint(self, index: int) -> str:
        return ("add_rms_norm", "sum")[index]


def rotations(vectors: Dim, cos: Value | None) -> Dim:
    """Operations to rotate `vectors` heads: two products and a sum for each rotated element."""
    return as_dim(0) if cos is None else 6 * vectors * cos.shape[1]


@op("nn.rope")
class Rope(Op):
    """Rotates the first R of the last axis of x [N, H, D] by tables cos, sin [N, R/2]; the rest passes through.

    half: (a, b) = (x[:R/2], x[R/2:R]); interleaved: a = x[0::2], b = x[1::2]; a' = a cos - b sin, b' = b cos + a sin.
    """

    rows = FirstAxis("x", "cos", "sin")
    noise = Noise.ROUNDS
    work = Work.LIGHT
    x: Operand
    cos: Operand
    sin: Operand
    style: Literal["half", "interleaved"] = "half"

    def infer(self) -> tuple[Type, ...]:
        no_partial(self)
        require_float(self, self.x, self.cos, self.sin)
        require_rank(self, self.x, 3)
        require_rank(self, self.cos, 2)
        require_shape(self.scope, self.sin.shape, self.cos.shape, "nn.rope: sin")
        broadcast(self.scope, [self.x.shape[0]], [self.cos.shape[0]], "nn.rope: tokens of x and cos")
        require_le(self.scope, as_dim(2) * self.cos.shape[1], self.x.shape[2], "nn.rope: rotated part of the head")
        return (self.x.tensor,)

    def cost(self, ctx: CostContext) -> Cost:
        return ctx.count(self, flops=rotations(self.x.shape[0] * self.x.shape[1], self.cos))

    def interp(self, ctx: EvalContext, x: Array, cos: Array, sin: Array) -> Array:
        return rope(ctx.up(x), ctx.up(cos), ctx.up(sin), self.style)


@op("nn.block_max")
class BlockMax(Op):
    """y[.., b] = the largest of x[.., block * b : block * (b + 1)], NaN where one of them is; the last block is short.

    Beside a row of logits it tells a sampler where to look: the largest logit is in the first of the largest blocks.
    """

    rows = LastAxis()
    noise = Noise.MOVES
    work = Work.LIGHT
    x: Operand
    block: int = 64

    def infer(self) -> tuple[Type, ...]:
        no_partial(self)
        require_float(self, self.x)
        if self.x.tensor.rank < 1 or self.block < 1:
            raise IrError(f"nn.block_max of {self.x.type} in blocks of {self.block}")
        return (self.x.tensor.with_(shape=(*self.x.shape[:-1], ceildiv(self.x.shape[-1], self.block))),)

    def cost(self, ctx: CostContext) -> Cost:
        return ctx.count(self, flops=self.x.tensor.elements)

    def interp(self, ctx: EvalContext, x: Array) -> Array:
        up = ctx.up(x)
        rest = -up.shape[-1] % self.block
        padded = np.pad(up, [(0, 0)] * (up.ndim - 1) + [(0, rest)], constant_values=-np.inf)
        blocks = padded.shape[-1] // self.block
        return np.asarray(np.max(padded.reshape(*up.shape[:-1], blocks, self.block), axis=-1))
