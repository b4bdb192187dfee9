"""Elementwise tensor ops of several operands: arithmetic, comparisons, logic, where. Owns their rules and meanings.

Operands broadcast like numpy. Both sides have the same dtype, except that a t.const scalar takes the other's.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from xllm_compiler.ir.core import Op
from xllm_compiler.ir.cost import Cost, CostContext
from xllm_compiler.ir.diag import IrError
from xllm_compiler.ir.facts import Noise, Work
from xllm_compiler.ir.opdef import Operand, op
from xllm_compiler.ir.rows import Broadcast
from xllm_compiler.ir.semantics import Array, EvalContext
from xllm_compiler.ir.shapes import broadcast, common_dtype, no_partial
from xllm_compiler.ir.types import Tensor, Type


def _infer_binary(op: Op, dtype: str | None = None) -> tuple[Type, ...]:
    no_partial(op)
    a, b = op.operands
    common = common_dtype(op.name, a, b)
    return (Tensor(dtype or common, broadcast(op.scope, a.shape, b.shape, op.name)),)


def reject_bool(op: Op) -> None:
    """IrError when an operand is bool."""
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


class Elementwise(Op):
    """What all of them share: operands meet element by element, and each element of the result is one operation."""

    rows = Broadcast()

    def cost(self, ctx: CostContext) -> Cost:
        return ctx.count(self, flops=self.result.tensor.elements)


@op("t.add", linear=True, commutative=True)
class Add(Elementwise):
    """y = a + b. Two partial sums over the same group add up to a partial sum."""

    noise = Noise.ROUNDS
    work = Work.LIGHT
    a: Operand
    b: Operand

    def infer(self) -> tuple[Type, ...]:
        reject_bool(self)
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


class _Arith(Elementwise):
    """What binary arithmetic shares: numbers in, the common dtype out."""

    FN: ClassVar[np.ufunc]
    a: Operand
    b: Operand

    def infer(self) -> tuple[Type, ...]:
        reject_bool(self)
        return _infer_binary(self)

    def interp(self, ctx: EvalContext, a: Array, b: Array) -> Array:
        return np.asarray(self.FN(*_pair(ctx, a, b)))


class _Compare(Elementwise):
    """What comparisons share: bool out."""

    noise = Noise.EXACT
    work = Work.LIGHT
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

    noise = Noise.ROUNDS
    work = Work.LIGHT
    FN = np.subtract


@op("t.mul", commutative=True)
class Mul(_Arith):
    """y = a * b."""

    noise = Noise.ROUNDS
    work = Work.LIGHT
    FN = np.multiply


@op("t.div")
class Div(_Arith):
    """y = a / b, floats only."""

    noise = Noise.ROUNDS
    work = Work.HEAVY
    FN = np.divide

    def infer(self) -> tuple[Type, ...]:
        types = super().infer()
        if not isinstance(types[0], Tensor) or not types[0].is_float:
            raise IrError(f"t.div needs floats, not {types[0]}", help="use t.floordiv or insert t.cast")
        return types


@op("t.pow")
class Pow(_Arith):
    """y = a ** b."""

    noise = Noise.ROUNDS
    work = Work.HEAVY
    FN = np.power


@op("t.max", commutative=True)
class Max(_Arith):
    """y = max(a, b); NaN wins."""

    noise = Noise.MOVES
    work = Work.LIGHT
    FN = np.maximum


@op("t.min", commutative=True)
class Min(_Arith):
    """y = min(a, b); NaN wins."""

    noise = Noise.MOVES
    work = Work.LIGHT
    FN = np.minimum


@op("t.floordiv")
class FloorDiv(_Arith):
    """y = floor(a / b), also for negative integers."""

    noise = Noise.ROUNDS
    work = Work.HEAVY
    FN = np.floor_divide


@op("t.mod")
class Mod(_Arith):
    """y = a - b * floor(a / b): the sign of b, like Python's %."""

    noise = Noise.ROUNDS
    work = Work.HEAVY
    FN = np.mod


@op("t.eq", commutative=True)
class Eq(_Compare):
    """y = a == b, bool."""

    FN = np.equal


@op("t.ne", commutative=True)
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


class _Logic(Elementwise):
    """What the connectives share: bool in and out."""

    noise = Noise.EXACT
    work = Work.LIGHT
    FN: ClassVar[np.ufunc]
    a: Operand
    b: Operand

    def infer(self) -> tuple[Type, ...]:
        for v in self.operands:
            if v.dtype != "bool":
                raise IrError(f"{self.name} needs bool, %{v.name} is {v.dtype}")
        return _infer_binary(self)

    def interp(self, ctx: EvalContext, a: Array, b: Array) -> Array:
        return np.asarray(self.FN(a, b))


@op("t.and", commutative=True)
class And(_Logic):
    """y = a and b, bool."""

    FN = np.logical_and


@op("t.or", commutative=True)
class Or(_Logic):
    """y = a or b, bool."""

    FN = np.logical_or


@op("t.where")
class Where(Elementwise):
    """y = a where c else b."""

    noise = Noise.MOVES
    work = Work.LIGHT
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
