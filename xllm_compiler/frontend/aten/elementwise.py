"""Elementwise aten operations: arithmetic, comparisons, functions of one number, selection, casts."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from xllm_compiler.frontend.importer import Importer, Item, handles
from xllm_compiler.ir import ops
from xllm_compiler.ir.core import Op, Value

FLOATS = ("f64", "f32", "bf16", "f16")


def binary(im: Importer, cls: type[Op], a: Item, b: Item, dtype: str | None = None) -> Value:
    """cls(a, b) computed in torch's result dtype (or in `dtype`), scalars as constants."""
    want = dtype or im.dtype_of()
    return im.emit(cls, im.number(a, want), im.number(b, want))


def _scaled(im: Importer, other: Item, alpha: Item, dtype: str) -> Value:
    y = im.number(other, dtype)
    return y if alpha == 1 else im.emit(ops.Mul, y, im.number(alpha, dtype))


@handles("aten.add.Tensor", "aten.add.Scalar")
def add(im: Importer, x: Item, other: Item, alpha: Item = 1) -> Value:
    dtype = im.dtype_of()
    return im.emit(ops.Add, im.number(x, dtype), _scaled(im, other, alpha, dtype))


@handles("aten.sub.Tensor", "aten.sub.Scalar")
def sub(im: Importer, x: Item, other: Item, alpha: Item = 1) -> Value:
    dtype = im.dtype_of()
    return im.emit(ops.Sub, im.number(x, dtype), _scaled(im, other, alpha, dtype))


@handles("aten.rsub.Scalar", "aten.rsub.Tensor")
def rsub(im: Importer, x: Item, other: Item, alpha: Item = 1) -> Value:
    dtype = im.dtype_of()
    return im.emit(ops.Sub, im.number(other, dtype), _scaled(im, x, alpha, dtype))


@handles("aten.mul.Tensor", "aten.mul.Scalar")
def mul(im: Importer, x: Item, other: Item) -> Value:
    if im.dtype_of() == "bool":
        return im.emit(ops.And, im.number(x, "bool"), im.number(other, "bool"))
    return binary(im, ops.Mul, x, other)


@handles("aten.div.Tensor", "aten.div.Scalar")
def div(im: Importer, x: Item, other: Item) -> Value:
    return binary(im, ops.Div, x, other)


@handles("aten.div.Tensor_mode", "aten.div.Scalar_mode")
def div_mode(im: Importer, x: Item, other: Item, rounding_mode: str | None) -> Value:
    if rounding_mode is None:
        return binary(im, ops.Div, x, other)
    if rounding_mode != "floor":
        raise im.unsupported(f"division rounded by {rounding_mode!r}")
    return binary(im, ops.FloorDiv, x, other)


@handles("aten.floor_divide.default", "aten.floor_divide.Scalar")
def floor_divide(im: Importer, x: Item, other: Item) -> Value:
    return binary(im, ops.FloorDiv, x, other)


@handles("aten.remainder.Scalar", "aten.remainder.Tensor")
def remainder(im: Importer, x: Item, other: Item) -> Value:
    return binary(im, ops.Mod, x, other)


@handles("aten.pow.Tensor_Scalar", "aten.pow.Tensor_Tensor", "aten.pow.Scalar")
def power(im: Importer, x: Item, exponent: Item) -> Value:
    return binary(im, ops.Pow, x, exponent)


@handles("aten.maximum.default", "aten.max.other")
def maximum(im: Importer, x: Item, other: Item) -> Value:
    return binary(im, ops.Max, x, other)


@handles("aten.minimum.default", "aten.min.other")
def minimum(im: Importer, x: Item, other: Item) -> Value:
    return binary(im, ops.Min, x, other)


def _comparison(cls: type[Op]) -> Callable[[Importer, Item, Item], Value]:
    def compare(im: Importer, x: Item, other: Item) -> Value:
        kinds = [a.dtype if isinstance(a, Value) else _python_dtype(a) for a in (x, other)]
        values = [a for a in (x, other) if isinstance(a, Value)]
        if len(values) == 2:
            node = im.node
            metas = [a.meta["val"].dtype for a in node.args if isinstance(a, torch.fx.Node)]
            dtype = im.dtype(torch.promote_types(*metas)) if len(metas) == 2 else kinds[0]
        else:
            dtype = values[0].dtype
            if any(k == "f32" for k in kinds) and dtype not in FLOATS:
                dtype = "f32"
            elif dtype == "bool" and any(k == "i32" for k in kinds):
                dtype = "i32"
        return im.emit(cls, im.number(x, dtype), im.number(other, dtype))

    return compare


def _python_dtype(value: Item) -> str:
    return "bool" if isinstance(value, bool) else "f32" if isinstance(value, float) else "i32"


for _name, _cls in {
    "eq": ops.Eq,
    "ne": ops.Ne,
    "lt": ops.Lt,
    "le": ops.Le,
    "gt": ops.Gt,
    "ge": ops.Ge,
}.items():
    handles(f"aten.{_name}.Tensor", f"aten.{_name}.Scalar")(_comparison(_cls))


@handles("aten.logical_and.default", "aten.bitwise_and.Tensor", "aten.__and__.Tensor")
def logical_and(im: Importer, x: Value, other: Item) -> Value:
    if im.dtype_of() != "bool":
        raise im.unsupported("bit operations on integers")
    return im.emit(ops.And, im.number(x, "bool"), im.number(other, "bool"))


@handles("aten.logical_or.default", "aten.bitwise_or.Tensor", "aten.__or__.Tensor")
def logical_or(im: Importer, x: Value, other: Item) -> Value:
    if im.dtype_of() != "bool":
        raise im.unsupported("bit operations on integers")
    return im.emit(ops.Or, im.number(x, "bool"), im.number(other, "bool"))


@handles("aten.logical_not.default", "aten.bitwise_not.default")
def logical_not(im: Importer, x: Value) -> Value:
    if x.dtype != "bool":
        raise im.unsupported("bit operations on integers")
    return im.emit(ops.Not, x)


def _unary(cls: type[Op]) -> Callable[[Importer, Value], Value]:
    def apply(im: Importer, x: Value) -> Value:
        return im.emit(cls, im.cast(x, im.dtype_of()))

    return apply


for _name, _function in {
    "neg": ops.Neg,
    "exp": ops.Exp,
    "log": ops.Log,
    "sqrt": ops.Sqrt,
    "rsqrt": ops.Rsqrt,
    "sin": ops.Sin,
    "cos": ops.Cos,
    "tanh": ops.Tanh,
    "sigmoid": ops.Sigmoid,
    "silu": ops.Silu,
    "relu": ops.Relu,
    "erf": ops.Erf,
    "abs": ops.Abs,
    "floor": ops.Floor,
}.items():
    handles(f"aten.{_name}.default")(_unary(_function))


@handles("aten.square.default")
def square(im: Importer, x: Value) -> Value:
    return im.emit(ops.Mul, x, x)


@handles("aten.reciprocal.default")
def reciprocal(im: Importer, x: Value) -> Value:
    return binary(im, ops.Div, 1.0, x)


@handles("aten.expm1.default")
def expm1(im: Importer, x: Value) -> Value:
    """exp(x) - 1. Loses digits near 0 against torch; computed in f32 whatever the dtype, absolute error below 1e-7."""
    wide = im.cast(x, "f32")
    return im.cast(im.emit(ops.Sub, im.emit(ops.Exp, wide), im.number(1.0, "f32")), im.dtype_of())


@handles("aten.log1p.default")
def log1p(im: Importer, x: Value) -> Value:
    """ln(1 + x), with the same remark as expm1."""
    wide = im.cast(x, "f32")
    return im.cast(im.emit(ops.Log, im.emit(ops.Add, wide, im.number(1.0, "f32"))), im.dtype_of())


@handles("aten.gelu.default")
def gelu(im: Importer, x: Value, approximate: str = "none") -> Value:
    return im.emit(ops.Gelu, x, tanh=approximate == "tanh")


@handles("aten.softplus.default")
def softplus(im: Importer, x: Value, beta: Item = 1, threshold: Item = 20) -> Value:
    """Torch is linear above `threshold`; ln(1 + e^x) - x is below 3e-9 there, which no dtype of ours can show."""
    if beta != 1 or threshold < 20:
        raise im.unsupported(f"softplus with beta={beta}, threshold={threshold}")
    return im.emit(ops.Softplus, x)


@handles("aten.leaky_relu.default")
def leaky_relu(im: Importer, x: Value, negative_slope: Item = 0.01) -> Value:
    positive = im.emit(ops.Gt, x, im.number(0.0, x.dtype))
    return im.emit(ops.Where, positive, x, im.emit(ops.Mul, x, im.number(negative_slope, x.dtype)))


@handles("aten.clamp.default", "aten.clamp_min.default", "aten.clamp_max.default")
def clamp(im: Importer, x: Value, min: Item = None, max: Item = None) -> Value:
    dtype = im.dtype_of()
    x = im.cast(x, dtype)
    if not isinstance(min, Value) and not isinstance(max, Value):
        lo = -math.inf if min is None else float(min)
        return im.emit(ops.Clamp, x, lo=lo, hi=math.inf if max is None else float(max))
    if min is not None:
        x = im.emit(ops.Max, x, im.number(min, dtype))
    if max is not None:
        x = im.emit(ops.Min, x, im.number(max, dtype))
    return x


@handles("aten.where.self", "aten.where.ScalarSelf", "aten.where.ScalarOther", "aten.where.Scalar")
def where(im: Importer, condition: Value, x: Item, other: Item) -> Value:
    dtype = im.dtype_of()
    both = not isinstance(x, Value) and not isinstance(other, Value)
    a = im.constant(x, dtype) if both else im.number(x, dtype)
    return im.emit(ops.Where, condition, a, im.constant(other, dtype) if both else im.number(other, dtype))


@handles("aten.masked_fill.Scalar", "aten.masked_fill.Tensor")
def masked_fill(im: Importer, x: Value, mask: Value, value: Item) -> Value:
    return im.emit(ops.Where, mask, im.number(value, x.dtype), x)


@handles("aten.to.dtype", "aten._to_copy.default", "aten.to.dtype_layout", "aten.to.device", view=True)
def to(im: Importer, x: Value, **_: Item) -> Value:
    return im.cast(x, im.dtype_of())


@handles("aten.to.other", "aten.type_as.default", view=True)
def to_other(im: Importer, x: Value, other: Value, **_: Item) -> Value:
    return im.cast(x, im.dtype_of())


def _same(im: Importer, x: Value, **_: Item) -> Value:
    return x


handles("aten.contiguous.default", "aten.detach.default", "aten.alias.default", "aten.detach_.default", view=True)(
    _same
)
handles("aten.clone.default", "aten.lift_fresh_copy.default")(_same)


@handles("aten.dropout.default")
def dropout(im: Importer, input: Value, p: float, train: bool) -> Value:
    if train and p != 0:
        raise im.unsupported("dropout that is switched on")
    return input


@handles("aten.addcmul.default")
def addcmul(im: Importer, x: Value, tensor1: Value, tensor2: Value, value: Item = 1) -> Value:
    dtype = im.dtype_of()
    product = im.emit(ops.Mul, im.cast(tensor1, dtype), im.cast(tensor2, dtype))
    return im.emit(ops.Add, im.cast(x, dtype), _scaled(im, product, value, dtype))


@handles("aten.lerp.Tensor", "aten.lerp.Scalar")
def lerp(im: Importer, x: Value, end: Value, weight: Item) -> Value:
    difference = im.emit(ops.Sub, end, x)
    return im.emit(ops.Add, x, im.emit(ops.Mul, difference, im.number(weight, x.dtype)))
