"""Elementwise tensor ops of one operand: functions, signs, bounds, casts. Owns their type rules and meanings."""

from __future__ import annotations

import math

import numpy as np

from xllm_compiler.ir.diag import IrError
from xllm_compiler.ir.facts import Noise, Work
from xllm_compiler.ir.opdef import DType, Operand, op
from xllm_compiler.ir.ops.elementwise import Elementwise, reject_bool
from xllm_compiler.ir.semantics import Array, EvalContext, erf, gelu, sigmoid, silu
from xllm_compiler.ir.shapes import no_partial, require_float
from xllm_compiler.ir.types import Tensor, Type


class _Function(Elementwise):
    """What functions of a float share: the result has the operand's type."""

    noise = Noise.ROUNDS
    work = Work.HEAVY
    x: Operand

    def infer(self) -> tuple[Type, ...]:
        no_partial(self)
        require_float(self, self.x)
        return (self.x.tensor,)


class _Sign(Elementwise):
    """What the unary ops on any number share: the result is the operand, 0, or the operand with another sign."""

    noise = Noise.MOVES
    work = Work.LIGHT
    x: Operand

    def infer(self) -> tuple[Type, ...]:
        no_partial(self)
        reject_bool(self)
        return (self.x.tensor,)


@op("t.neg")
class Neg(_Sign):
    """y = -x."""

    def interp(self, ctx: EvalContext, x: Array) -> Array:
        return np.negative(ctx.up(x))


@op("t.abs")
class Abs(_Sign):
    """y = |x|."""

    def interp(self, ctx: EvalContext, x: Array) -> Array:
        return np.abs(ctx.up(x))


@op("t.relu")
class Relu(_Sign):
    """y = max(x, 0)."""

    def interp(self, ctx: EvalContext, x: Array) -> Array:
        return np.maximum(ctx.up(x), 0)


@op("t.exp")
class Exp(_Function):
    """y = e ** x."""

    def interp(self, ctx: EvalContext, x: Array) -> Array:
        return np.exp(ctx.up(x))


@op("t.log")
class Log(_Function):
    """y = ln x."""

    def interp(self, ctx: EvalContext, x: Array) -> Array:
        return np.log(ctx.up(x))


@op("t.sqrt")
class Sqrt(_Function):
    """y = sqrt(x)."""

    def interp(self, ctx: EvalContext, x: Array) -> Array:
        return np.sqrt(ctx.up(x))


@op("t.rsqrt")
class Rsqrt(_Function):
    """y = 1 / sqrt(x)."""

    def interp(self, ctx: EvalContext, x: Array) -> Array:
        return np.reciprocal(np.sqrt(ctx.up(x)))


@op("t.sin")
class Sin(_Function):
    """y = sin x."""

    def interp(self, ctx: EvalContext, x: Array) -> Array:
        return np.sin(ctx.up(x))


@op("t.cos")
class Cos(_Function):
    """y = cos x."""

    def interp(self, ctx: EvalContext, x: Array) -> Array:
        return np.cos(ctx.up(x))


@op("t.tanh")
class Tanh(_Function):
    """y = tanh x."""

    def interp(self, ctx: EvalContext, x: Array) -> Array:
        return np.tanh(ctx.up(x))


@op("t.sigmoid")
class Sigmoid(_Function):
    """y = 1 / (1 + e ** -x)."""

    def interp(self, ctx: EvalContext, x: Array) -> Array:
        return sigmoid(ctx.up(x))


@op("t.silu")
class Silu(_Function):
    """y = x * sigmoid(x)."""

    def interp(self, ctx: EvalContext, x: Array) -> Array:
        return silu(ctx.up(x))


@op("t.erf")
class Erf(_Function):
    """y = 2 / sqrt(pi) * integral of e ** -t^2 from 0 to x."""

    def interp(self, ctx: EvalContext, x: Array) -> Array:
        return erf(ctx.up(x))


@op("t.floor")
class Floor(_Function):
    """y = the greatest integer <= x, as a float."""

    noise = Noise.EXACT
    work = Work.LIGHT

    def interp(self, ctx: EvalContext, x: Array) -> Array:
        return np.floor(ctx.up(x))


@op("t.softplus")
class Softplus(_Function):
    """y = ln(1 + e ** x)."""

    def interp(self, ctx: EvalContext, x: Array) -> Array:
        up = ctx.up(x)
        return np.maximum(up, 0) + np.log1p(np.exp(-np.abs(up)))


@op("t.gelu")
class Gelu(_Function):
    """y = x * Phi(x), or with `tanh` its usual approximation."""

    tanh: bool = False

    def interp(self, ctx: EvalContext, x: Array) -> Array:
        return gelu(ctx.up(x), self.tanh)


@op("t.not")
class Not(Elementwise):
    """y = not x, bool."""

    noise = Noise.EXACT
    work = Work.LIGHT
    x: Operand

    def infer(self) -> tuple[Type, ...]:
        if self.x.dtype != "bool":
            raise IrError(f"t.not needs bool, %{self.x.name} is {self.x.dtype}")
        return (self.x.tensor,)

    def interp(self, ctx: EvalContext, x: Array) -> Array:
        return np.logical_not(x)


@op("t.clamp")
class Clamp(Elementwise):
    """y = min(max(x, lo), hi); an infinite bound does nothing. NaN stays NaN."""

    noise = Noise.MOVES
    work = Work.LIGHT
    x: Operand
    lo: float = -math.inf
    hi: float = math.inf

    def infer(self) -> tuple[Type, ...]:
        no_partial(self)
        reject_bool(self)
        return (self.x.tensor,)

    def interp(self, ctx: EvalContext, x: Array) -> Array:
        up = ctx.up(x)
        if not math.isinf(self.lo):
            up = np.maximum(up, np.asarray(self.lo).astype(up.dtype))
        if not math.isinf(self.hi):
            up = np.minimum(up, np.asarray(self.hi).astype(up.dtype))
        return up


@op("t.cast")
class Cast(Elementwise):
    """y = x as `dtype`: floats round to nearest even, float to int truncates, anything nonzero is true."""

    noise = Noise.MOVES
    work = Work.LIGHT
    x: Operand
    dtype: DType

    def infer(self) -> tuple[Type, ...]:
        no_partial(self)
        return (Tensor(self.dtype, self.x.shape),)

    def interp(self, ctx: EvalContext, x: Array) -> Array:
        if self.dtype == "bool":
            return np.not_equal(x, 0)
        return x.astype(ctx.dtype(self.dtype), copy=False)
