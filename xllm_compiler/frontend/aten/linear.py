"""Matrix products, norms, reductions, softmax: aten operations that combine elements along an axis."""

from __future__ import annotations

from typing import Any

from xllm_compiler.frontend.importer import Importer, Item, handles
from xllm_compiler.ir import ops
from xllm_compiler.ir.core import Value


@handles("aten.linear.default")
def linear(im: Importer, input: Value, weight: Value, bias: Value | None = None) -> Value:
    return im.emit(ops.Linear, input, weight, bias=bias)


@handles("aten.addmm.default")
def addmm(im: Importer, x: Value, mat1: Value, mat2: Value, beta: Item = 1, alpha: Item = 1) -> Value:
    """bias + mat1 @ mat2: the transposed weight of GPT-2's Conv1D."""
    if beta != 1 or alpha != 1:
        raise im.unsupported(f"addmm with beta={beta}, alpha={alpha}")
    weight = im.transpose(mat2, (1, 0))
    if x.tensor.rank == 1:
        return im.emit(ops.Linear, mat1, weight, bias=x)
    return im.emit(ops.Add, im.emit(ops.Linear, mat1, weight), x)


@handles("aten.mm.default", "aten.bmm.default")
def mm(im: Importer, x: Value, mat2: Value) -> Value:
    return im.emit(ops.MatMul, x, mat2)


@handles("aten.matmul.default")
def matmul(im: Importer, x: Value, other: Value) -> Value:
    shape = im.shape_of()
    a = im.reshape(x, (1, *x.shape)) if x.tensor.rank == 1 else x
    b = im.reshape(other, (*other.shape, 1)) if other.tensor.rank == 1 else other
    return im.reshape(im.emit(ops.MatMul, a, b), shape)


@handles("aten.layer_norm.default")
def layer_norm(
    im: Importer,
    input: Value,
    normalized_shape: list[int],
    weight: Value | None = None,
    bias: Value | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Value:
    if len(normalized_shape) != 1:
        raise im.unsupported(f"layer_norm over {len(normalized_shape)} axes")
    return im.emit(ops.LayerNorm, input, w=weight, b=bias, eps=eps)


_EPS = {"f32": 1.1920928955078125e-07, "bf16": 0.0078125, "f16": 0.0009765625, "f64": 2.220446049250313e-16}


@handles("aten.rms_norm.default")
def rms_norm(
    im: Importer, input: Value, normalized_shape: list[int], weight: Value | None = None, eps: float | None = None
) -> Value:
    """Without eps torch takes the machine epsilon of the dtype it computes in, which is f32 for 16-bit inputs."""
    if len(normalized_shape) != 1:
        raise im.unsupported(f"rms_norm over {len(normalized_shape)} axes")
    default = _EPS["f64" if input.dtype == "f64" else "f32"]
    return im.emit(ops.RmsNorm, input, w=weight, eps=default if eps is None else eps)


@handles("aten.softmax.int", "aten._softmax.default")
def softmax(im: Importer, x: Value, dim: int, dtype: Any = None, half_to_float: bool = False) -> Value:
    return im.emit(ops.Softmax, im.cast(x, im.dtype_of()), axis=dim)


def _axes(x: Value, dim: Any) -> tuple[int, ...]:
    """Torch's `dim` argument: one axis, several, or (None, []) all."""
    dims = [dim] if isinstance(dim, int) else list(dim or range(x.tensor.rank))
    return tuple(d % x.tensor.rank for d in dims)


def _reduce(im: Importer, x: Value, kind: str, dim: Any, keepdim: bool) -> Value:
    return im.emit(ops.Reduce, im.cast(x, im.dtype_of()), kind=kind, axes=_axes(x, dim), keep=keepdim)


@handles("aten.sum.dim_IntList", "aten.sum.default")
def reduce_sum(im: Importer, x: Value, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Value:
    return _reduce(im, x, "sum", dim, keepdim)


@handles("aten.mean.dim", "aten.mean.default")
def reduce_mean(im: Importer, x: Value, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Value:
    return _reduce(im, x, "mean", dim, keepdim)


@handles("aten.amax.default")
def amax(im: Importer, x: Value, dim: Any = (), keepdim: bool = False) -> Value:
    return _reduce(im, x, "max", dim, keepdim)


@handles("aten.amin.default")
def amin(im: Importer, x: Value, dim: Any = (), keepdim: bool = False) -> Value:
    return _reduce(im, x, "min", dim, keepdim)


@handles("aten.max.default")
def max_all(im: Importer, x: Value) -> Value:
    return _reduce(im, x, "max", None, False)


def _variance(im: Importer, x: Value, dim: Any, correction: Item, keepdim: bool) -> Value:
    mean = _reduce(im, x, "mean", dim, True)
    centred = im.emit(ops.Sub, x, mean)
    square = im.emit(ops.Mul, centred, centred)
    if not correction:
        return _reduce(im, square, "mean", dim, keepdim)
    count = 1
    for axis in _axes(x, dim):
        count *= x.shape[axis].value
    total = _reduce(im, square, "sum", dim, keepdim)
    return im.emit(ops.Div, total, im.number(float(count - correction), x.dtype))


@handles("aten.var.correction")
def var(im: Importer, x: Value, dim: Any = None, correction: Item = None, keepdim: bool = False) -> Value:
    return _variance(im, x, dim, 1 if correction is None else correction, keepdim)


@handles("aten.var.dim")
def var_dim(im: Importer, x: Value, dim: Any, unbiased: bool = True, keepdim: bool = False) -> Value:
    return _variance(im, x, dim, 1 if unbiased else 0, keepdim)


@handles("aten.std.correction")
def std(im: Importer, x: Value, dim: Any = None, correction: Item = None, keepdim: bool = False) -> Value:
    return im.emit(ops.Sqrt, _variance(im, x, dim, 1 if correction is None else correction, keepdim))


@handles("aten.std.dim")
def std_dim(im: Importer, x: Value, dim: Any, unbiased: bool = True, keepdim: bool = False) -> Value:
    return im.emit(ops.Sqrt, _variance(im, x, dim, 1 if unbiased else 0, keepdim))


@handles("aten.linalg_vector_norm.default")
def vector_norm(
    im: Importer, x: Value, ord: Item = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None
) -> Value:
    return _norm(im, x, ord, dim, keepdim)


def _norm(im: Importer, x: Value, order: Item, dim: Any, keepdim: bool) -> Value:
    if order != 2:
        raise im.unsupported(f"a norm of order {order}")
    x = im.cast(x, im.dtype_of())
    return im.emit(ops.Sqrt, _reduce(im, im.emit(ops.Mul, x, x), "sum", dim, keepdim))


@handles("aten.norm.ScalarOpt_dim")
def norm(im: Importer, x: Value, p: Item, dim: Any, keepdim: bool = False) -> Value:
    return _norm(im, x, 2 if p is None else p, dim, keepdim)


@handles("aten.cumsum.default")
def cumsum(im: Importer, x: Value, dim: int, dtype: Any = None) -> Value:
    return im.emit(ops.CumSum, im.cast(x, im.dtype_of()), axis=dim)
