"""Shapes: views, transposes, slices, concatenations, broadcasts, and tensors made from nothing."""

from __future__ import annotations

from collections.abc import Sequence

from xllm_compiler.dims import Dim, as_dim
from xllm_compiler.frontend.importer import Importer, Item, handles
from xllm_compiler.ir import ops
from xllm_compiler.ir.core import Value

_VIEWS = (
    "aten.view.default",
    "aten.reshape.default",
    "aten._unsafe_view.default",
    "aten.unsqueeze.default",
    "aten.squeeze.default",
    "aten.squeeze.dim",
    "aten.squeeze.dims",
    "aten.flatten.using_ints",
    "aten.unflatten.int",
    "aten.view_as.default",
    "aten.reshape_as.default",
)


@handles(*_VIEWS, view=True)
def view(im: Importer, x: Value, **_: Item) -> Value:
    """Every view that keeps the elements in row-major order; the traced shape says it all, -1 included."""
    return im.reshape(x, im.shape_of())


@handles("aten.transpose.int", view=True)
def transpose(im: Importer, x: Value, dim0: int, dim1: int) -> Value:
    perm = list(range(x.tensor.rank))
    perm[dim0], perm[dim1] = perm[dim1], perm[dim0]
    return im.transpose(x, perm)


@handles("aten.t.default", view=True)
def t(im: Importer, x: Value) -> Value:
    return im.transpose(x, list(range(x.tensor.rank))[::-1])


@handles("aten.permute.default", view=True)
def permute(im: Importer, x: Value, dims: Sequence[int]) -> Value:
    return im.transpose(x, [d % x.tensor.rank for d in dims])


@handles("aten.movedim.int", "aten.movedim.intlist", view=True)
def movedim(im: Importer, x: Value, source: Item, destination: Item) -> Value:
    rank = x.tensor.rank
    sources = [s % rank for s in ([source] if isinstance(source, int) else source)]
    targets = [d % rank for d in ([destination] if isinstance(destination, int) else destination)]
    rest = iter([a for a in range(rank) if a not in sources])
    place = dict(zip(targets, sources, strict=True))
    return im.transpose(x, [place[i] if i in place else next(rest) for i in range(rank)])


@handles("aten.expand.default", "aten.expand_as.default", "aten.broadcast_to.default", view=True)
def expand(im: Importer, x: Value, **_: Item) -> Value:
    return im.expand(x, im.shape_of())


@handles("aten.repeat.default")
def repeat(im: Importer, x: Value, repeats: Sequence[Item]) -> Value:
    """Tiles x: each axis becomes [times, size] and the two are merged."""
    counts = [im.size(r) for r in repeats]
    lead = len(counts) - x.tensor.rank
    shape: list[Dim] = [as_dim(1)] * lead + list(x.shape)
    x = im.reshape(x, [d for s in shape for d in (as_dim(1), s)])
    x = im.expand(x, [d for c, s in zip(counts, shape, strict=True) for d in (c, s)])
    return im.reshape(x, [c * s for c, s in zip(counts, shape, strict=True)])


@handles("aten.repeat_interleave.self_int")
def repeat_interleave(im: Importer, x: Value, repeats: Item, dim: int | None = None, output_size: Item = None) -> Value:
    if dim is None:
        x, dim = im.reshape(x, [x.tensor.elements]), 0
    axis, times = dim % x.tensor.rank, im.size(repeats)
    shape = list(x.shape)
    wide = [*shape[: axis + 1], times, *shape[axis + 1 :]]
    x = im.expand(im.reshape(x, [*shape[: axis + 1], 1, *shape[axis + 1 :]]), wide)
    return im.reshape(x, [*shape[:axis], shape[axis] * times, *shape[axis + 1 :]])


def _bound(im: Importer, value: Item, size: Dim, default: Dim) -> Dim:
    """A slice bound in 0..size, by Python's rules for negative and too large ones."""
    if value is None:
        return default
    at = im.size(value)
    scope = im.b.func.module.scope
    if at.is_const and at.value >= 2**62:
        return size
    if at.is_const and at.value < 0:
        at = size + at
        if scope.prove(at) is True:
            return at
    elif scope.prove_le(at, size) is True:
        return at
    elif scope.prove_le(size, at) is True:
        return size
    raise im.unsupported(f"a slice at {value} of {size} elements, which may or may not be inside")


@handles("aten.slice.Tensor", view=True)
def slice_(im: Importer, x: Value, dim: int = 0, start: Item = None, end: Item = None, step: Item = 1) -> Value:
    size = x.shape[dim]
    lo, hi = _bound(im, start, size, as_dim(0)), _bound(im, end, size, size)
    every = im.size(step).value
    if lo == 0 and hi == size and every == 1:
        return x
    return im.emit(ops.Slice, x, axis=dim, start=lo, stop=hi, step=every)


@handles("aten.narrow.default", view=True)
def narrow(im: Importer, x: Value, dim: int, start: Item, length: Item) -> Value:
    return im.emit(ops.Slice, x, axis=dim, start=im.size(start), stop=im.size(start) + im.size(length))


@handles("aten.select.int", view=True)
def select(im: Importer, x: Value, dim: int, index: Item) -> Value:
    axis, at = dim % x.tensor.rank, im.size(index)
    if at.is_const and at.value < 0:
        at = x.shape[axis] + at
    shape = [d for i, d in enumerate(x.shape) if i != axis]
    if x.shape[axis] == 1:
        return im.reshape(x, shape)
    return im.reshape(im.emit(ops.Slice, x, axis=axis, start=at, stop=at + 1), shape)


def _pieces(im: Importer, x: Value, axis: int, sizes: Sequence[Dim]) -> list[Value]:
    out, at = [], as_dim(0)
    for size in sizes:
        out.append(im.emit(ops.Slice, x, axis=axis, start=at, stop=at + size))
        at = at + size
    return out


@handles("aten.split_with_sizes.default", "aten.split.sizes", view=True)
def split_sizes(im: Importer, x: Value, split_sizes: Item = None, dim: int = 0, split_size: Item = None) -> list[Value]:
    return _pieces(im, x, dim % x.tensor.rank, [im.size(s) for s in (split_sizes or split_size)])


@handles("aten.split.Tensor", "aten.chunk.default", "aten.tensor_split.sections", view=True)
def split(im: Importer, x: Value, dim: int = 0, **_: Item) -> list[Value]:
    axis = dim % x.tensor.rank
    return _pieces(im, x, axis, [im.shape_of(i)[axis] for i in range(len(im.node.meta["val"]))])


@handles("aten.unbind.int", view=True)
def unbind(im: Importer, x: Value, dim: int = 0) -> list[Value]:
    axis = dim % x.tensor.rank
    count = x.shape[axis].value
    shape = [d for i, d in enumerate(x.shape) if i != axis]
    return [im.reshape(piece, shape) for piece in _pieces(im, x, axis, [as_dim(1)] * count)]


@handles("aten.cat.default", "aten.concat.default")
def cat(im: Importer, tensors: list[Value], dim: int = 0) -> Value:
    dtype = im.dtype_of()
    return im.emit(ops.Concat, *[im.cast(x, dtype) for x in tensors], axis=dim)


@handles("aten.stack.default")
def stack(im: Importer, tensors: list[Value], dim: int = 0) -> Value:
    shape = im.shape_of()
    axis = dim % len(shape)
    one = [as_dim(1) if i == axis else d for i, d in enumerate(shape)]
    dtype = im.dtype_of()
    return im.emit(ops.Concat, *[im.reshape(im.cast(x, dtype), one) for x in tensors], axis=axis)


@handles("aten.constant_pad_nd.default", "aten.pad.default")
def pad(im: Importer, x: Value, pad: Sequence[Item], mode: str = "constant", value: Item = 0.0) -> Value:
    if mode != "constant":
        raise im.unsupported(f"padding by {mode!r}")
    for i in range(0, len(pad), 2):
        lo, hi = im.size(pad[i]), im.size(pad[i + 1])
        if lo != 0 or hi != 0:
            x = im.emit(ops.Pad, x, axis=x.tensor.rank - 1 - i // 2, lo=lo, hi=hi, value=float(value or 0.0))
    return x


@handles("aten.arange.default", "aten.arange.start", "aten.arange.start_step")
def arange(im: Importer, end: Item, start: Item = 0, step: Item = 1, **_: Item) -> Value:
    dtype = im.dtype_of()
    size = im.shape_of()[0]
    if any(isinstance(v, float) and not v.is_integer() for v in (start, step)):
        raise im.unsupported("arange of fractions")
    counted = im.emit(ops.Iota, size=size, dtype="i32")
    if step != 1:
        counted = im.emit(ops.Mul, counted, im.number(int(step), "i32"))
    if start != 0:
        counted = im.emit(ops.Add, counted, im.number(start if isinstance(start, Dim) else int(start), "i32"))
    return im.cast(counted, dtype)


def _full(im: Importer, value: Item) -> Value:
    shape = im.shape_of()
    return im.expand(im.constant(value, im.dtype_of()), shape)


@handles("aten.full.default")
def full(im: Importer, size: Item, fill_value: Item, **_: Item) -> Value:
    return _full(im, fill_value)


@handles("aten.full_like.default", "aten.new_full.default")
def full_like(im: Importer, x: Value, fill_value: Item, **_: Item) -> Value:
    return _full(im, fill_value)


@handles("aten.scalar_tensor.default")
def scalar_tensor(im: Importer, s: Item, **_: Item) -> Value:
    return im.constant(s, im.dtype_of())


@handles("aten.zeros.default", "aten.zeros_like.default", "aten.new_zeros.default")
def zeros(im: Importer, **_: Item) -> Value:
    return _full(im, 0)


@handles("aten.new_empty.default", "aten.empty_like.default", "aten.empty.memory_format")
def empty(im: Importer, **_: Item) -> Value:
    """Memory that the model fills: what it holds before that has no meaning in torch either."""
    return _full(im, 0)


@handles("aten.ones.default", "aten.ones_like.default", "aten.new_ones.default")
def ones(im: Importer, **_: Item) -> Value:
    return _full(im, 1)


@handles("aten.fill.Scalar")
def fill(im: Importer, x: Value, value: Item) -> Value:
    return _full(im, value)
