"""fold: arithmetic on constants, identities, chains of shape changes. Owns rules that look at one or two ops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from xllm_compiler.dims import Dim, as_dim
from xllm_compiler.ir.core import Func, Op, Value
from xllm_compiler.ir.ops import (
    Abs,
    Add,
    Cast,
    Concat,
    Const,
    Cos,
    Div,
    Exp,
    Expand,
    Floor,
    FloorDiv,
    Log,
    Max,
    Min,
    Mod,
    Mul,
    Neg,
    Pad,
    Pow,
    Reshape,
    Rsqrt,
    Sin,
    Slice,
    Sqrt,
    Sub,
    Tanh,
    Transpose,
)
from xllm_compiler.ir.rewrite import Rewriter, Rule, apply_rules, rule
from xllm_compiler.ir.semantics import EvalContext
from xllm_compiler.passes.base import FuncPass, PassContext
from xllm_compiler.passes.registry import register_pass

# Casts that lose nothing, so that casting back gives the same value.
LOSSLESS: Final = frozenset(
    {("bf16", "f32"), ("f16", "f32"), ("bf16", "f64"), ("f16", "f64"), ("f32", "f64")}
    | {("i8", "i32"), ("u8", "i32"), ("i8", "i64"), ("u8", "i64"), ("i32", "i64"), ("i32", "f64")}
    | {("bool", d) for d in ("i8", "u8", "i32", "i64", "f32", "f64", "bf16", "f16")}
)
_FOLDABLE: Final[tuple[type[Op], ...]] = (
    *(Add, Sub, Mul, Div, Pow, Max, Min, FloorDiv, Mod),
    *(Neg, Abs, Exp, Log, Sqrt, Rsqrt, Sin, Cos, Tanh, Floor),
    Cast,
)


@register_pass("fold")
@dataclass(frozen=True)
class Fold(FuncPass):
    """Evaluates scalar constants and removes operations that do nothing.

    before:  %c = t.const(value=1.0) : f32[]             after:  return %x
             %y = t.mul(%x, %c) : f32[N, 8]
             %z = t.reshape(%y, shape=[N, 2, 4]) : f32[N, 2, 4]
             %u = t.reshape(%z, shape=[N, 8]) : f32[N, 8]
             return %u

    x*1, x/1, x**1, x+0, x-0; a cast to the dtype it has, or to and fro without loss; two transposes, reshapes, expands
    or slices in a row; a slice of everything, or of one operand of a concat; a transpose that only moves unit axes
    becomes a reshape. Unused parameters go with the rest that is dead.
    """

    def run_on(self, func: Func, ctx: PassContext) -> bool:
        return apply_rules(func, RULES, self.name, ctx).changed


def scalar_of(v: Value) -> int | float | bool | None:
    """The value of a `t.const`, or None."""
    return v.op.value if isinstance(v.op, Const) else None


def _is(v: Value, number: int) -> bool:
    value = scalar_of(v)
    return value is not None and not isinstance(value, bool) and value == number


# ----------------------------------------------------------------------------------------------------------- constants


def fold_constant(op: Op, rw: Rewriter) -> bool:
    """Every operand is a t.const: so is the result."""
    if not op.operands or not all(isinstance(v.op, Const) for v in op.operands):
        return False
    if isinstance(op, Pow) and not op.result.tensor.is_float:  # a negative integer power has no value
        return False
    ctx = EvalContext({}, {})
    ty = op.result.tensor
    values = [np.asarray(scalar_of(v), ctx.dtype(v.dtype)) for v in op.operands]
    with np.errstate(all="ignore"):
        array = op.interp(ctx, *values)
    assert not isinstance(array, tuple)
    stored = ctx.store(array, ty)
    value = (stored.astype(np.float64) if ty.is_float else stored).item()
    rw.replace(op, rw.create(Const, value=value, dtype=ty.dtype))
    return True


# ---------------------------------------------------------------------------------------------------------- identities


def _keep(op: Op, x: Value, rw: Rewriter) -> bool:
    """`op` is its operand `x`, provided the type agrees (a broadcast or a lifted constant changes it)."""
    if op.result.type != x.type:
        return False
    rw.replace(op, x)
    return True


@rule(Add)
def add_zero(op: Add, rw: Rewriter) -> bool:
    return (_is(op.b, 0) and _keep(op, op.a, rw)) or (_is(op.a, 0) and _keep(op, op.b, rw))


@rule(Sub)
def sub_zero(op: Sub, rw: Rewriter) -> bool:
    return _is(op.b, 0) and _keep(op, op.a, rw)


@rule(Mul)
def mul_one(op: Mul, rw: Rewriter) -> bool:
    return (_is(op.b, 1) and _keep(op, op.a, rw)) or (_is(op.a, 1) and _keep(op, op.b, rw))


@rule(Div)
def div_one(op: Div, rw: Rewriter) -> bool:
    return _is(op.b, 1) and _keep(op, op.a, rw)


@rule(Pow)
def pow_one(op: Pow, rw: Rewriter) -> bool:
    return _is(op.b, 1) and _keep(op, op.a, rw)


@rule(Neg)
def neg_neg(op: Neg, rw: Rewriter) -> bool:
    inner = op.x.op
    return isinstance(inner, Neg) and _keep(op, inner.x, rw)


@rule(Cast)
def cast_nothing(op: Cast, rw: Rewriter) -> bool:
    return _keep(op, op.x, rw)


@rule(Cast)
def cast_back(op: Cast, rw: Rewriter) -> bool:
    """cast(cast(x)): the middle type drops out where it holds every value of x's."""
    inner = op.x.op
    if not isinstance(inner, Cast) or (inner.x.dtype, inner.dtype) not in LOSSLESS:
        return False
    source = inner.x
    if isinstance(source.op, Const):  # folded as constants; a constant's dtype follows its user
        return False
    rw.replace(op, source if source.dtype == op.dtype else rw.create(Cast, source, dtype=op.dtype))
    return True


# -------------------------------------------------------------------------------------------------------------- shapes


@rule(Reshape)
def reshape_chain(op: Reshape, rw: Rewriter) -> bool:
    if _keep(op, op.x, rw):
        return True
    inner = op.x.op
    if not isinstance(inner, Reshape):
        return False
    rw.replace(op, rw.create(Reshape, inner.x, shape=op.shape))
    return True


@rule(Transpose)
def transpose_chain(op: Transpose, rw: Rewriter) -> bool:
    if op.perm == tuple(range(len(op.perm))):
        return _keep(op, op.x, rw)
    inner = op.x.op
    if isinstance(inner, Transpose):
        rw.replace(op, rw.create(Transpose, inner.x, perm=tuple(inner.perm[p] for p in op.perm)))
        return True
    moved = [p for p in op.perm if op.x.shape[p] != 1]
    if moved == sorted(moved):  # the order of the elements stays
        rw.replace(op, rw.create(Reshape, op.x, shape=op.result.shape))
        return True
    return False


@rule(Expand)
def expand_chain(op: Expand, rw: Rewriter) -> bool:
    if _keep(op, op.x, rw):
        return True
    inner = op.x.op
    if not isinstance(inner, Expand):
        return False
    rw.replace(op, rw.create(Expand, inner.x, shape=op.shape))
    return True


@rule(Pad)
def pad_nothing(op: Pad, rw: Rewriter) -> bool:
    return op.lo == 0 and op.hi == 0 and _keep(op, op.x, rw)


@rule(Concat)
def concat_one(op: Concat, rw: Rewriter) -> bool:
    return len(op.xs) == 1 and _keep(op, op.xs[0], rw)


@rule(Concat)
def concat_adjacent_slices(op: Concat, rw: Rewriter) -> bool:
    """concat(x[a:b], x[b:c], ..) is x[a:c]."""
    xs: list[Value] = []
    for v in op.xs:
        last, this = xs[-1].op if xs else None, v.op
        if (
            isinstance(last, Slice)
            and isinstance(this, Slice)
            and last.x is this.x
            and last.axis == this.axis == op.axis
            and last.step == this.step == 1
            and last.stop is this.start
        ):
            xs[-1] = rw.create(Slice, this.x, axis=op.axis, start=last.start, stop=this.stop).result
        else:
            xs.append(v)
    if len(xs) == len(op.xs):
        return False
    rw.replace(op, xs[0] if len(xs) == 1 else rw.create(Concat, *xs, axis=op.axis))
    return True


@rule(Slice)
def slice_chain(op: Slice, rw: Rewriter) -> bool:
    if op.start == 0 and op.step == 1 and op.stop is op.x.shape[op.axis] and _keep(op, op.x, rw):
        return True
    inner = op.x.op
    if isinstance(inner, Slice) and inner.axis == op.axis and inner.step == 1:
        start, stop = inner.start + op.start, inner.start + op.stop
        rw.replace(op, rw.create(Slice, inner.x, axis=op.axis, start=start, stop=stop, step=op.step))
        return True
    return False


@rule(Slice)
def slice_of_concat(op: Slice, rw: Rewriter) -> bool:
    """A slice that lies within one operand of a concat is a slice of that operand."""
    inner = op.x.op
    if not isinstance(inner, Concat) or inner.axis != op.axis:
        return False
    at: Dim = as_dim(0)
    for v in inner.xs:
        end = at + v.shape[op.axis]
        others = [d for i, d in enumerate(v.shape) if i != op.axis]
        same = others == [d for i, d in enumerate(op.result.shape) if i != op.axis]
        if same and op.scope.prove_le(at, op.start) is True and op.scope.prove_le(op.stop, end) is True:
            piece = rw.create(Slice, v, axis=op.axis, start=op.start - at, stop=op.stop - at, step=op.step)
            rw.replace(op, piece)
            return True
        at = end
    return False


def _constant_rule(cls: type[Op]) -> Rule:
    named: Callable[[Op, Rewriter], bool] = fold_constant
    return rule(cls)(named)


RULES: Final[tuple[Rule, ...]] = (
    *(_constant_rule(cls) for cls in _FOLDABLE),
    *(add_zero, sub_zero, mul_one, div_one, pow_one, neg_neg),
    *(cast_nothing, cast_back),
    *(reshape_chain, transpose_chain, expand_chain, pad_nothing),
    *(concat_one, concat_adjacent_slices, slice_chain, slice_of_concat),
)
