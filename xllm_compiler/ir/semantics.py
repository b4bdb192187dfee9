"""What op meanings are written against: arrays, dtypes, rounding. Owns numerics helpers; must not run functions.

Arrays are numpy; bf16 is ml_dtypes.bfloat16. A state is one array of all rows of its blocks. A KV cache is
[pages * page, heads, k_dim + v_dim]: row `page_index * page + position % page`, keys in the first k_dim columns. A cell
is [slots, *shape].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import ml_dtypes
import numpy as np
import numpy.typing as npt

from xllm_compiler.dims import Dim
from xllm_compiler.errors import XllmError
from xllm_compiler.ir.diag import IrError
from xllm_compiler.ir.types import FLOATS, Event, Future, Kv, State, Tensor, Type

Array = npt.NDArray[Any]
MAX_ELEMENTS: Final = 1 << 44  # of an array; numpy refuses what is not far above with an error of its own

NP_DTYPE: Final[dict[str, np.dtype[Any]]] = {
    "f64": np.dtype(np.float64),
    "f32": np.dtype(np.float32),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "f16": np.dtype(np.float16),
    "i64": np.dtype(np.int64),
    "i32": np.dtype(np.int32),
    "i8": np.dtype(np.int8),
    "u8": np.dtype(np.uint8),
    "bool": np.dtype(np.bool_),
}
OUR_DTYPE: Final[dict[np.dtype[Any], str]] = {v: k for k, v in NP_DTYPE.items()}


class EvalContext:
    """Sizes, parameters and precision of one run.

    `precise`: every float is f64 and nothing is rounded; for telling wrong algebra from rounding.
    """

    def __init__(self, params: Mapping[str, Array], dims: Mapping[str, int], precise: bool = False) -> None:
        self.params = params
        self.dims = dict(dims)
        self.precise = precise

    def dim(self, d: Dim) -> int:
        return d.evaluate(self.dims)

    def shape(self, ty: Tensor) -> tuple[int, ...]:
        return tuple(self.dim(d) for d in ty.shape)

    def dtype(self, dtype: str) -> np.dtype[Any]:
        """How values of one of our dtypes are stored in this run."""
        return NP_DTYPE["f64" if self.precise and dtype in FLOATS else dtype]

    def up(self, x: Array) -> Array:
        """`x` in computing precision: floats become f32 (f64 stays, and is forced when precise); the rest is kept."""
        if OUR_DTYPE[x.dtype] not in FLOATS:
            return x
        wide = np.float64 if self.precise or x.dtype == np.float64 else np.float32
        return x.astype(wide, copy=False)

    def store(self, x: Array, ty: Type) -> Array:
        """A result rounded (once, to nearest even) to how `ty` is stored."""
        return np.asarray(x).astype(self.dtype(stored_dtype(ty)), copy=False)


def stored_dtype(ty: Type) -> str:
    """Of the array that holds a value of type `ty`: an event is an empty array of truths."""
    match ty:
        case Future():
            return ty.of.dtype
        case Event():
            return "bool"
        case State():
            return ty.array_dtype
        case Tensor():
            return ty.dtype


def state_zeros(ty: State, dims: Mapping[str, int], precise: bool = False) -> Array:
    """A state of type `ty` as it is before the first call: zeros."""
    ctx = EvalContext({}, dims, precise)
    return np.zeros(array_shape(ctx, ty), ctx.dtype(ty.array_dtype))


def array_shape(ctx: EvalContext, ty: Type) -> tuple[int, ...]:
    """The shape of the array that holds a value of type `ty`. Raises as `possible` does."""
    match ty:
        case Tensor():
            return possible(ctx.shape(ty), ty)
        case State():
            return possible(tuple(ctx.dim(d) for d in ty.array_shape), ty)
        case Future():
            return possible(ctx.shape(ty.of), ty)
        case Event():
            return (0,)


def possible(shape: tuple[int, ...], ty: Type) -> tuple[int, ...]:
    """`shape`, which some array can have. Raises kind "ir" for a negative size, and "capacity" for more elements than
    any machine holds, which numpy does not even try."""
    if any(size < 0 for size in shape):
        raise IrError(f"a value of type {ty} has a negative size here", help="choose other sizes of the dims")
    if math.prod(shape) > MAX_ELEMENTS or any(size > MAX_ELEMENTS for size in shape):
        raise XllmError(
            "capacity", f"an array for {str(ty)[:200]} is larger than any memory", help="ask for smaller sizes"
        )
    return shape


def silu(x: Array) -> Array:
    """x * sigmoid(x)."""
    return np.multiply(x, sigmoid(x))


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), without overflow for large |x|."""
    e = np.exp(-np.abs(x))
    return np.asarray(np.where(x >= 0, 1, e).astype(x.dtype) / (1 + e))


def erf(x: Array) -> Array:
    """The error function, computed in f64 and returned in x's dtype."""
    flat = np.fromiter((math.erf(v) for v in x.ravel().tolist()), np.float64, x.size)
    return flat.reshape(x.shape).astype(x.dtype)


def gelu(x: Array, tanh: bool) -> Array:
    """x * Phi(x), or its tanh approximation."""
    if tanh:
        inner = np.sqrt(2 / np.pi).astype(x.dtype) * (x + x.dtype.type(0.044715) * x * x * x)
        return np.asarray(x.dtype.type(0.5) * x * (1 + np.tanh(inner)))
    return np.asarray(x.dtype.type(0.5) * x * (1 + erf(x * x.dtype.type(2**-0.5))))


def activation(name: str, x: Array) -> Array:
    """The activations that nn.linear and nn.linear_glu know by name."""
    match name:
        case "none":
            return x
        case "silu":
            return silu(x)
        case "gelu":
            return gelu(x, tanh=False)
        case "gelu_tanh":
            return gelu(x, tanh=True)
        case "relu":
            return np.maximum(x, 0)
        case "relu2":
            return np.square(np.maximum(x, 0))
        case "sigmoid":
            return sigmoid(x)
        case "tanh":
            return np.tanh(x)
        case _:
            raise AssertionError(f"activation {name}")


def rms_norm(x: Array, w: Array | None, eps: float, offset: float) -> Array:
    """x / sqrt(mean(x^2 over the last axis) + eps) * (w + offset)."""
    eps_ = x.dtype.type(eps)
    y = x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + eps_)
    return np.asarray(y if w is None else y * (w + w.dtype.type(offset)))


def layer_norm(x: Array, w: Array | None, b: Array | None, eps: float) -> Array:
    """(x - mean) / sqrt(variance + eps) * w + b, over the last axis."""
    centred = x - np.mean(x, axis=-1, keepdims=True)
    y = centred / np.sqrt(np.mean(np.square(centred), axis=-1, keepdims=True) + x.dtype.type(eps))
    if w is not None:
        y = y * w
    return np.asarray(y if b is None else y + b)


def rope(x: Array, cos: Array, sin: Array, style: str) -> Array:
    """Rotates the first 2 * cos.shape[-1] of the last axis of x [N, H, D]; the rest passes through."""
    half = cos.shape[-1]
    c, s = cos[:, None, :], sin[:, None, :]
    out = x.copy()
    if style == "half":
        a, b = x[..., :half], x[..., half : 2 * half]
        out[..., :half] = a * c - b * s
        out[..., half : 2 * half] = b * c + a * s
    else:
        a, b = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
        out[..., 0 : 2 * half : 2] = a * c - b * s
        out[..., 1 : 2 * half : 2] = b * c + a * s
    return out


def kv_stored(ty: Kv, x: Array, dtype: np.dtype[Any]) -> Array:
    """Keys or values [.., dim] as a cache of type `ty`, kept as `dtype`, holds them: rounded by head to 8 bits
    (scale = max |x| / 127, NaN where not all are finite), or just to the dtype."""
    if not ty.quantized:
        return x.astype(dtype, copy=False)
    top = np.abs(x).max(axis=-1, keepdims=True, initial=0)
    finite = np.isfinite(x).all(axis=-1, keepdims=True)
    factor = np.divide(x.dtype.type(127), top, out=np.zeros_like(top), where=finite & (top > 0))
    stored = np.rint(np.where(finite, x, 0) * factor) * (top * x.dtype.type(1 / 127))
    return np.asarray(np.where(finite, stored, np.nan), dtype)


def cell_slots(slot: Array, slots: int) -> Array:
    """`slot` as indices of a cell's `slots` slots; IrError where one is none of them."""
    wrong = (slot < 0) | (slot >= slots)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise IrError(f"row {row} names slot {int(slot[row])} of a cell of {slots} slots")
    return slot.astype(np.int64)


def kv_rows(ty: Kv, pos: Array, seq: Array, table: Array) -> Array:
    """Cache rows of token positions `pos` of requests `seq`, through the block table."""
    pages = table[seq, pos // ty.page].astype(np.int64)
    if pages.size and pages.min() < 0:
        n = int(np.argmin(pages))
        raise IrError(f"position {int(pos[n])} of request {int(seq[n])} has no page")
    return np.asarray(pages * ty.page + pos % ty.page)
