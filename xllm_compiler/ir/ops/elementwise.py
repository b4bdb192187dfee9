"""Elementwise tensor ops: binary, unary, clamp, where, cast. Owns their shape rules and reference meanings.

Operands broadcast like numpy. Both sides have the same dtype, except that a t.const scalar takes the other's.
"""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np

from xllm_compiler.ir.core import Op
from xllm_compiler.ir.diag import IrError
from xllm_compiler.ir.opdef import DType, Operand, op
from xllm_compiler.ir.semantics import Array, EvalContext, erf, gelu, sigmoid, silu
from xllm_compiler.ir.shapes import broadcast, common_dtype, no_partial, require_float
from xllm_compiler.ir.types import Tensor, Type


def _infer_binary(op: Op, dtype: str | None = None) -> tuple[Type, ...]:
    no_partial(op)
    a, b = op.operands
    common = common_dtype(op.name, a, b)
    return (Tensor(dtype or common, broadcast(op.scope, a.shape, b.shape, op.name)),)


def _reject_bool(op: Op) -> None:
    for v in op.operands:
        if v.dtype == "bool":
            raise IrError(f"{op.name} is arithmetic, %{v.name} is bool", help="insert t.cast")


def _pair(ctx: EvalContext, a: Array, b: Array) -> tuple[Array, Array]:
    """Both in computing precision. A lifted constant must not widen an f32 computation, nor an i32 one."""
    x, y = ctx.up(a), ctx.up(b)
    if x.dtype != y.dtype:
        if x.ndim == 0 and y.ndim > 0:
            x = x.astype(y.dtype)
        elif y.ndim == 0 and x.ndim > 0:
            y = y.astype(x.dtype)
    return x, y


@op("t.add", linear=True)
class Add(Op):
    """y = a + b. Two partial sums over the same group add up to a partial sum."""

    a: Operand
    b: Operand

    def infer(self) -> tuple[Type, ...]:
        _reject_bool(self)
        parts = [v.tensor.partial for v in self.operands]
        if parts[0] != parts[1]:
            raise IrError(
                f"t.add of {self.a.type} and {self.b.type}: a partial sum adds only to one over the same group",
                help="comm.all_reduce_start and comm.wait it first",
            )
        shape = broadcast(self.scope, self.a.shape, self.b.shape, self.name)
        return (Tensor(common_dtype(self.name, self.a, self.b), shape, parts[0]),)

    def interp(self, ctx: EvalContext, a: Array, b: Array) -> Array:
        x, y = _pair(ctx, a, b)
        return np.add(x, y)


class _Arith(Op):
    """What binary arithmetic shares: numbers in, the common dtype out."""

    FN: ClassVar[np.ufunc]
    a: Operand
    b: Operand

    def infer(self) -> tuple[Type, ...]:
        _reject_bool(self)
        return _infer_binary(self)

    def interp(self, ctx: EvalContext, a: Array, b: Array) -> Array:
        return np.asarray(self.FN(*_pair(ctx, a, b)))


class _Compare(Op):
    """What comparisons share: bool out."""

    FN: ClassVar[np.ufunc]
    a: Operand
    b: Operand

    def infer(self) -> tuple[Type, ...]:
        return _infer_binary(self, "bool")

    def interp(self, ctx: EvalContext, a: Array, b: Array) -> Array:
        return np.asarray(self.FN(*_pair(ctx, a, b)))


@op("t.sub")
class Sub(_Arith):
    """y = a - b."""

    FN = np.subtract


@op("t.mul")
class Mul(_Arith):
    """y = a * b."""

    FN = np.multiply


@op("t.div")
class Div(_Arith):
    """y = a / b, floats only."""

    FN = np.divide

    def infer(self) -> tuple[Type, ...]:
        types = super().infer()
        if not isinstance(types[0], Tensor) or not types[0].is_float:
            raise IrError(f"t.div needs floats, not {types[0]}", help="use t.floordiv or insert t.cast")
        return types


@op("t.pow")
class Pow(_Arith):
    """y = a ** b."""

    FN = np.power


@op("t.max")
class Max(_Arith):
    """y = max(a, b); NaN wins."""

    FN = np.maximum


@op("t.min")
class Min(_Arith):
    """y = min(a, b); NaN wins."""

    FN = np.minimum


@op("t.floordiv")
class FloorDiv(_Arith):
    """y = floor(a / b), also for negative integers."""

    FN = np.floor_divide


@op("t.mod")
class Mod(_Arith):
    """y = a - b * floor(a / b): the sign of b, like Python's %."""

    FN = np.mod


@op("t.eq")
class Eq(_Compare):
    """y = a == b, bool."""

    FN = np.equal


@op("t.ne")
class Ne(_Compare):
    """y = a != b, bool."""

    FN = np.not_equal


@op("t.lt")
class Lt(_Compare):
    """y = a < b, bool."""

    FN = np.less


@op("t.le")
class Le(_Compare):
    """y = a <= b, bool."""

    FN = np.less_equal


@op("t.gt")
class Gt(_Compare):
    """y = a > b, bool."""

    FN = np.greater


@op("t.ge")
class Ge(_Compare):
    """y = a >= b, bool."""

    FN = np.greater_equal


def _infer_logic(op: Op) -> tuple[Type, ...]:
    for v in op.operands:
        if v.dtype != "bool":
            raise IrError(f"{op.name} needs bool, %{v.name} is {v.dtype}")
    return _infer_binary(op)


@op("t.and")
class And(Op):
    """y = a and b, bool."""

    a: Operand
    b: Operand

    def infer(self) -> tuple[Type, ...]:
        return _infer_logic(self)

    def interp(self, ctx: EvalContext, a: Array, b: Array) -> Array:
        return np.logical_and(a, b)


@op("t.or")
class Or(Op):
    """y = a or b, bool."""

    a: Operand
    b: Operand

    def infer(self) -> tuple[Type, ...]:
        return _infer_logic(self)

    def interp(self, ctx: EvalContext, a: Array, b: Array) -> Array:
        return np.logical_or(a, b)


class _FloatUnary(Op):
    """What the float-only unary ops share: the result has the operand's type."""

    x: Operand

    def infer(self) -> tuple[Type, ...]:
        no_partial(self)
        require_float(self, self.x)
        return (self.x.tensor,)


class _NumberUnary(Op):
    """What the unary ops on any number share."""

    x: Operand

    def infer(self) -> tuple[Type, ...]:
        no_partial(self)
        _reject_bool(self)
        return (self.x.tensor,)


@op("t.neg")
class Neg(_NumberUnary):
    """y = -x."""

    def interp(self, ctx: EvalContext, x: Array) -> Array:
        return np.negative(ctx.up(x))


@op("t.abs")
class Abs(_NumberUnary):
    """y = |x|."""

    def interp(self, ctx: EvalContext, x: Array) -> Array:
        return np.abs(ctx.up(x))


@op("t.relu")
class Relu(_NumberUnary):
    """y = max(x, 0)."""

    def interp(self, ctx: EvalContext, x: Array) -> Array:
        return np.maximum(ctx.up(x), 0)


@op("t.exp")
class Exp(_FloatUnary):
    """y = e ** x."""

    def interp(self, ctx: EvalContext, x: Array) -> Array:
        return np.exp(ctx.up(x))


@op("t.log")
class Log(_FloatUnary):
    """y = ln x."""

    def interp(self, ctx: EvalContext, x: Array) -> Array:
        return np.log(ctx.up(x))


@op("t.sqrt")
class Sqrt(_FloatUnary):
    """y = sqrt(x)."""

    def interp(self, ctx: EvalContext, x: Array) -> Array:
        return np.sqrt(ctx.up(x))


@op("t.rsqrt")
class Rsqrt(_FloatUnary):
    """y = 1 / sqrt(x)."""

    def interp(self, ctx: EvalContext, x: Array) -> Array:
        return np.reciprocal(np.sqrt(ctx.up(x)))


@op("t.sin")
class Sin(_FloatUnary):
    """y = sin x."""

    def interp(self, ctx: EvalContext, x: Array) -> Array:
        return np.sin(ctx.up(x))


@op("t.cos")
class Cos(_FloatUnary):
    """y = cos x."""

    def interp(self, ctx: EvalContext, x: Array) -> Array:
        return np.cos(ctx.up(x))


@op("t.tanh")
class Tanh(_FloatUnary):
    """y = tanh x."""

    def interp(self, ctx: EvalContext, x: Array) -> Array:
        return np.tanh(ctx.up(x))


@op("t.sigmoid")
class Sigmoid(_FloatUnary):
    """y = 1 / (1 + e ** -x)."""

    def interp(self, ctx: EvalContext, x: Array) -> Array:
        return sigmoid(ctx.up(x))


@op("t.silu")
class Silu(_FloatUnary):
    """y = x * sigmoid(x)."""

    def interp(self, ctx: EvalContext, x: Array) -> Array:
        return silu(ctx.up(x))


@op("t.erf")
class Erf(_FloatUnary):
    """y = 2 / sqrt(pi) * integral of e ** -t^2 from 0 to x."""

    def interp(self, ctx: EvalContext, x: Array) -> Array:
        return erf(ctx.up(x))


@op("t.floor")
class Floor(_FloatUnary):
    """y = the greatest integer <= x, as a float."""

    def interp(self, ctx: EvalContext, x: Array) -> Array:
        return np.floor(ctx.up(x))


@op("t.softplus")
class Softplus(_FloatUnary):
    """y = ln(1 + e ** x)."""

    def interp(self, ctx: EvalContext, x: Array) -> Array:
        up = ctx.up(x)
        return np.maximum(up, 0) + np.log1p(np.exp(-np.abs(up)))


@op("t.gelu")
class Gelu(_FloatUnary):
    """y = x * Phi(x), or with `tanh` its usual approximation."""

    tanh: bool = False

    def interp(self, ctx: EvalContext, x: Array) -> Array:
        return gelu(ctx.up(x), self.tanh)


@op("t.not")
class Not(Op):
    """y = not x, bool."""

    x: Operand

    def infer(self) -> tuple[Type, ...]:
        if self.x.dtype != "bool":
            raise IrError(f"t.not needs bool, %{self.x.name} is {self.x.dtype}")
        return (self.x.tensor,)

    def interp(self, ctx: EvalContext, x: Array) -> Array:
        return np.logical_not(x)


@op("t.clamp")
class Clamp(Op):
    """y = min(max(x, lo), hi); an infinite bound does nothing. NaN stays NaN."""

    x: Operand
    lo: float = -math.inf
    hi: float = math.inf

    def infer(self) -> tuple[Type, ...]:
        no_partial(self)
        _reject_bool(self)
        return (self.x.tensor,)

    def interp(self, ctx: EvalContext, x: Array) -> Array:
        up = ctx.up(x)
        if not math.isinf(self.lo):
            up = np.maximum(up, np.asarray(self.lo).astype(up.dtype))
        if not math.isinf(self.hi):
            up = np.minimum(up, np.asarray(self.hi).astype(up.dtype))
        return up


@op("t.where")
class Where(Op):
    """y = a where c else b."""

    c: Operand
    a: Operand
    b: Operand

    def infer(self) -> tuple[Type, ...]:
        no_partial(self)
        if self.c.dtype != "bool":
            raise IrError(f"t.where needs a bool condition, %{self.c.name} is {self.c.dtype}")
        values = broadcast(self.scope, self.a.shape, self.b.shape, self.name)
        shape = broadcast(self.scope, self.c.shape, values, self.name)
        return (Tensor(common_dtype(self.name, self.a, self.b), shape),)

    def interp(self, ctx: EvalContext, c: Array, a: Array, b: Array) -> Array:
        x, y = _pair(ctx, a, b)
        return np.where(c, x, y)


@op("t.cast")
class Cast(Op):
    """y = x as `dtype`: floats round to nearest even, float to int truncates, anything nonzero is true."""

    x: Operand
    dtype: DType

    def infer(self) -> tuple[Type, ...]:
        no_partial(self)
        return (Tensor(self.dtype, self.x.shape),)

    def interp(self, ctx: EvalContext, x: Array) -> Array:
        if self.dtype == "bool":
            return np.not_equal(x, 0)
        return x.astype(ctx.dtype(self.dtype), copy=False)
