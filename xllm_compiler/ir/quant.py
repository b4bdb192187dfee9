"""What quantization means: numbers to small integers and back. Owns the rounding rules; must not know ops or layouts.

What a weight format stores is said by its class (`weight_formats`). Activations are stored by row as integers in
-127 .. 127 with an f32 scale for the row, or, where they meet 8-bit weights in groups, for each group of it: a row's
largest value would else make the steps of all others coarse.

Weights on grids take 4 bits and half a byte or a quarter for each value more, where f16 scales in groups of 32 take as
much and know no points; and products are summed up over whole rows as those of 8 bits are. (Scales of scales are those
of llama.cpp's K-quants; that both are whole numbers, so that the integer product is that of 8 bits, is ours.)

Both sides of a product may be rotated first, which leaves it as it is: a few large values, which would make the steps
of all others coarse, are spread over their block (QuaRot, Ashkboos et al. 2024).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import numpy as np

from xllm_compiler.ir.blocks import in_blocks
from xllm_compiler.ir.semantics import NP_DTYPE, Array
from xllm_compiler.weight_formats import LARGEST, ROTATIONS, GridFormat, IntegerFormat, RowFormat, WeightFormat

_MIDDLE: Final = GridFormat.as_bytes.zero
_TOP: Final = GridFormat.most  # of a grid's numbers, steps and points
_GRID_STARTS: Final = (0.95, 1.05, 1.15)
"""Scales of rows on grids that are tried, as multiples of the one that gives the largest weight 127: larger ones leave
the run it is in a point near the middle."""
_STEPS_TRIED: Final = 2  # the least that holds all of a run, and one less: it cuts off the ends
_CANDIDATES: Final = 12  # scales tried for a group of 4 bits with a zero point
_STARTS: Final = (*(1.1 - 0.05 * i for i in range(10)), *(-8 / 7 * (1 - 0.06 * i) for i in range(6)))
"""Of a group of 4 bits without one: scales from which a fit starts, as multiples of the one that gives the largest
weight the integer -8. The negative ones give it 7, which has the finer steps on the other side."""
_STARTS_8: Final = tuple(1 + 0.004 * i for i in range(8))
"""The same for a group of 8 bits, whose largest weight becomes 127 at 1: a step a little coarser changes how all others
fall, and the best of eight leaves a fifth less error in groups of 32."""
_SHORT: Final = 256  # longest group for which numpy is faster across groups than along them


def rotation(in_: int) -> int:
    """The largest block that a row of `in_` values is whole blocks of; 0 without one."""
    return next((block for block in ROTATIONS if in_ % block == 0), 0)


def rotate(x: Array, block: int) -> Array:
    """The orthonormal Walsh-Hadamard transform of every `block` values along the last axis, which is its own inverse.
    With `block` 0: x. Sums are made by halves, partners 1 apart first, in x's float type."""
    if not block:
        return x
    out = x.reshape(-1, block)
    apart = 1
    with np.errstate(invalid="ignore"):
        while apart < block:
            pairs = out.reshape(len(out), -1, 2, apart)
            first, second = pairs[:, :, 0], pairs[:, :, 1]
            out = np.stack((first + second, first - second), axis=2).reshape(len(out), block)
            apart *= 2
    return np.asarray(out * out.dtype.type(block**-0.5)).reshape(x.shape)


def quantize_weight(w: Array, format: WeightFormat) -> tuple[Array, ...]:
    """Stored values u8 [out, in], scales [out, groups] and, if the format has them, zero points u8 [out, groups]."""
    match format:
        case IntegerFormat():
            made = quantize_integers(w, format)
            return made if format.zeros else made[:2]
        case GridFormat():
            return quantize_on_grids(w, format.grid)
    raise AssertionError(format)


def dequantize_weight(values: Array, scales: Array, zeros: Array | None, format: WeightFormat, wide: type) -> Array:
    """The weights [out, in] that stored values stand for, in the float type `wide`."""
    match format:
        case IntegerFormat():
            return _dequantize_integers(values, scales, zeros, format, wide)
        case GridFormat():
            return _dequantize_integers(values, scales, zeros, format.as_bytes, wide)
    raise AssertionError(format)


def quantize_integers(w: Array, format: IntegerFormat) -> tuple[Array, Array, Array]:
    """Stored values u8 [out, in], scales [out, groups], zero points u8 [out, groups].

    Without the format's `zeros` the zero point is the middle of the range. Of a whole row of 8 bits the largest weight
    becomes the largest integer. Elsewhere several scales are tried, and the one is taken that leaves the smallest sum
    of squared errors: with zero points of twelve (as the clipping search of AWQ does), without them of sixteen at 4
    bits, where clipping an outlier often pays, and of eight at 8, each of which is first replaced by the least-squares
    fit for the integers that it leads to (as in llama.cpp's make_qx_quants). Of ties the first is taken.

    Blocks of rows are done side by side on all processors; a group's result depends on nothing but the group.
    """
    out, in_ = w.shape
    count = format.groups(in_)
    size = format.group or in_
    values = np.empty((out, in_), np.uint8)
    scales, points = np.empty((out, count), _stored_scale(format)), np.empty((out, count), np.uint8)
    short = size <= _SHORT

    def block(rows: slice) -> None:
        part = np.zeros((len(w[rows]), count * size), np.float32)
        part[:, :in_] = w[rows]
        each = part.reshape(-1, size)
        if short:  # groups side by side: what is computed per group is then computed for many at once
            v, s, z = _quantize_groups(np.ascontiguousarray(each.T), 0, format)
            v = v.T
        else:
            v, s, z = _quantize_groups(each, 1, format)
        values[rows] = v.reshape(len(part), -1)[:, :in_]
        scales[rows] = s.reshape(len(part), count)
        points[rows] = z.reshape(len(part), count)

    in_blocks(out, count * size, block)
    return values, scales, points


def _quantize_groups(w: Array, axis: int, format: IntegerFormat) -> tuple[Array, Array, Array]:
    """The same for f32 of rank 2 in which a group lies along `axis`."""
    scale, zero = scales_of_groups(w, axis, format)
    stored = np.empty_like(w)
    nearest_integers(w, inverse_of(scale)[0], zero, format, stored)
    return stored.astype(np.uint8), scale, zero.astype(np.uint8)


def scales_of_groups(w: Array, axis: int, format: IntegerFormat, weights: Array | None = None) -> tuple[Array, Array]:
    """The scale of each group, as it is stored, and its zero point in f32: the best of those tried.

    A group lies along `axis` of `w`, f32 of rank 2. `weights`: what the square of an error counts, along that axis;
    None: 1."""
    bits, zeros, dtype = format.bits, format.zeros, _stored_scale(format)
    top, middle = (1 << bits) - 1, 1 << (bits - 1)
    low = np.minimum(w.min(axis=axis, initial=0, keepdims=True), 0)
    high = np.maximum(w.max(axis=axis, initial=0, keepdims=True), 0)
    if zeros:
        full = (high - low) / np.float32(top)  # 0 is representable: a group of positive weights has its zero point at 0
    elif bits == 8:
        full = np.maximum(-low, high) / np.float32(middle - 1)
    else:
        # the end of larger magnitude gets the integer -middle, which has no positive twin
        full = np.where(-low >= high, low, high) / np.float32(-middle)
    starts: tuple[float, ...] = () if zeros else _STARTS if bits == 4 else _STARTS_8 if format.group else ()
    if starts:
        full = _fitted(w, axis, full, starts, bits, weights)
    middles = np.full_like(low, middle)
    if bits != 4 or not zeros:
        scale, inverse, _ = _scale(full, dtype)
        return scale, np.clip(np.rint(-low * inverse), 0, top) if zeros else middles
    exact, work = np.empty_like(w), np.empty_like(w)
    best_scale, best_zero, best_error = np.zeros_like(low, dtype), middles, np.full_like(low, np.inf)
    for step in range(_CANDIDATES):
        scale, inverse, wide = _scale(full * np.float32(1 - 0.04 * step), dtype)
        zero = np.clip(np.rint(-low * inverse), 0, top)
        np.multiply(w, inverse, out=exact)
        exact += zero
        np.rint(exact, out=work)
        np.clip(work, 0, top, out=work)
        work -= exact
        np.square(work, out=work)
        if weights is not None:
            work *= weights
        error = np.where(wide != 0, np.add.reduce(work, axis=axis, keepdims=True) * np.square(wide), np.inf)
        better = error < best_error
        np.copyto(best_scale, scale, where=better)
        np.copyto(best_zero, zero, where=better)
        np.copyto(best_error, error, where=better)
    return best_scale, best_zero


def nearest_integers(w: Array, inverse: Array, zero: Array, format: IntegerFormat, out: Array) -> None:
    """Into `out`, f32: the stored integers of `w` by the inverses of its scales and by its zero points in f32."""
    np.multiply(w, inverse, out=out)
    first = np.float32(0)
    if format.zeros:
        out += zero
    else:
        first -= np.float32(format.zero)  # added last, or the sum would be rounded before the integer is
    np.rint(out, out=out)
    np.clip(out, first, first + np.float32((1 << format.bits) - 1), out=out)
    if not format.zeros:
        out -= first


def _stored_scale(format: IntegerFormat) -> np.dtype[Any]:
    return NP_DTYPE[format.scale_dtype]


def _fitted(w: Array, axis: int, full: Array, starts: tuple[float, ...], bits: int, weights: Array | None) -> Array:
    """The best least-squares scale of each group, begun from `starts` times `full`.

    For integers n, the scale sum(w n) / sum(n n) leaves sum(w w) - sum(w n)^2 / sum(n n): the subtrahend decides.
    """
    first = np.float32(-(1 << (bits - 1)))
    last = first + np.float32((1 << bits) - 1)
    usable = np.abs(full) >= np.finfo(np.float32).tiny
    units = w * np.divide(np.float32(1), full, out=np.zeros_like(full), where=usable)
    counted = units if weights is None else units * weights
    work = np.empty_like(w)
    best_fit, best_gain = np.zeros_like(full), np.zeros_like(full)
    for start in starts:
        np.multiply(units, np.float32(1 / start), out=work)
        np.rint(work, out=work)
        np.clip(work, first, last, out=work)
        along = np.add.reduce(counted * work, axis=axis, keepdims=True)
        np.square(work, out=work)
        if weights is not None:
            work *= weights
        own = np.add.reduce(work, axis=axis, keepdims=True)
        fit = np.divide(along, own, out=np.zeros_like(own), where=own > 0)
        better = along * fit > best_gain
        np.copyto(best_fit, fit, where=better)
        np.copyto(best_gain, along * fit, where=better)
    return np.asarray(full * best_fit)


def _scale(scale: Array, dtype: np.dtype[np.generic]) -> tuple[Array, Array, Array]:
    """A scale as it is stored, its inverse (0 where it is 0), and the stored one in f32."""
    largest = np.float32(65504 if dtype == np.float16 else np.finfo(np.float32).max)
    stored = np.clip(scale, -largest, largest).astype(dtype)
    return (stored, *inverse_of(stored))


def inverse_of(scale: Array) -> tuple[Array, Array]:
    """The inverse of a stored scale (0 where it is 0), and the scale itself, in f32."""
    wide = scale.astype(np.float32)
    return np.divide(np.float32(1), wide, out=np.zeros_like(wide), where=wide != 0), wide


def quantize_on_grids(w: Array, grid: int) -> tuple[Array, Array]:
    """Stored values u8 [out, in] and scales f32 [out, 1] of a weight on grids: of three scales of a row, each with the
    best of two steps for every run, the one that leaves the smallest sum of squared errors, after its least-squares fit
    to the numbers that it leads to. Of ties the first is taken; a row depends on nothing but itself."""
    out, in_ = w.shape
    runs = -(-in_ // grid)
    values, scales = np.empty((out, in_), np.uint8), np.empty((out, 1), np.float32)

    def block(rows: slice) -> None:
        part = np.zeros((len(w[rows]), runs * grid), np.float32)
        part[:, :in_] = w[rows]
        # runs side by side: what is computed per run is then computed for many at once
        found, scale = _rows_on_grids(np.ascontiguousarray(part.reshape(len(part), runs, grid).transpose(2, 0, 1)))
        values[rows] = found.transpose(1, 2, 0).reshape(part.shape)[:, :in_]
        scales[rows] = scale

    in_blocks(out, runs * grid, block)
    return values, scales


def _rows_on_grids(w: Array) -> tuple[Array, Array]:
    """The same of f32 [grid, rows, runs]: values of that shape, and scales [rows, 1]."""
    top = np.maximum(-w.min(axis=0, initial=0), w.max(axis=0, initial=0)).max(axis=1, initial=0, keepdims=True)
    best, best_scale = np.zeros_like(w), np.zeros_like(top)
    best_error = np.full_like(top, np.inf)
    units = np.empty_like(w)
    for start in _GRID_STARTS:
        scale = top * np.float32(start / (_MIDDLE - 1))
        usable = scale >= np.finfo(np.float32).tiny
        inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=usable)
        np.multiply(w, inverse, out=units)
        _, _, on, error = steps_of_runs(units)
        along, own = (
            _sum_of(a * b for a, b in zip(x, on, strict=True)).sum(axis=1, keepdims=True) for x in (units, on)
        )
        fit = np.divide(along, own, out=np.zeros_like(own), where=own > 0)
        # of the fit, in units that are the same for all starts
        left = (error.sum(axis=1, keepdims=True) - (own - 2 * along + along * fit)) * np.float32(start**2)
        better = left < best_error
        np.copyto(best, on, where=better)
        np.copyto(best_scale, fit * scale, where=better)
        np.copyto(best_error, left, where=better)
    return (best + np.float32(_MIDDLE)).astype(np.uint8), best_scale


def steps_of_runs(units: Array, weights: Array | None = None) -> tuple[Array, Array, Array, Array]:
    """Step and point of each run, what it is rounded to, and the sum of its squared errors: the best step of two.

    `units`: f32 [grid, ..], weights over their row's scale. `weights`: what the square of an error counts, [grid] and
    then ones; None: 1."""
    first, last = units.min(axis=0, initial=0), units.max(axis=0, initial=0)
    whole = np.clip(np.ceil((last - first) / np.float32(_TOP)), 1, _TOP)
    error, steps, points = np.full_like(first, np.inf), np.ones_like(first), np.zeros_like(first)
    on, tried = np.empty_like(units), np.empty_like(units)
    for less in range(_STEPS_TRIED):
        step = np.maximum(whole - np.float32(less), 1)
        # in the middle of what is to be held, and so that all 16 numbers are bytes
        point = np.rint(np.float32(_TOP / 2) - (first + last) / (2 * step))
        point = np.clip(point, _TOP - (_MIDDLE - 1) // step, np.minimum(_MIDDLE // step, _TOP))
        point = np.maximum(point, 0)
        np.multiply(units, 1 / step, out=tried)
        np.rint(tried, out=tried)
        np.clip(tried, -point, _TOP - point, out=tried)
        tried *= step
        if weights is None:
            off = _sum_of((a - b) ** 2 for a, b in zip(tried, units, strict=True))
        else:
            off = _sum_of((a - b) ** 2 * c for a, b, c in zip(tried, units, weights, strict=True))
        better = off < error
        np.copyto(on, tried, where=better)
        np.copyto(steps, step, where=better)
        np.copyto(points, point, where=better)
        np.copyto(error, off, where=better)
    return steps, points, on, error


def _sum_of(parts: Iterable[Array]) -> Array:
    """One after the other: numpy's own sum has an order that depends on the shape."""
    each = iter(parts)
    total = next(each)
    for part in each:
        total += part
    return total


def _dequantize_integers(values: Array, scales: Array, zeros: Array | None, format: IntegerFormat, wide: type) -> Array:
    in_, group = values.shape[1], format.group
    each: Array = np.repeat(scales.astype(wide), group, axis=1)[:, :in_] if group else scales.astype(wide)
    if zeros is None:
        point: Array = np.asarray(format.zero, wide)
    else:
        point = np.repeat(zeros.astype(wide), group, axis=1)[:, :in_] if group else zeros.astype(wide)
    return np.asarray((values.astype(wide) - point) * each)


def quantize_rows(x: Array, format: RowFormat) -> tuple[Array, Array, Array]:
    """Stored values i8 [.., padded], scales f32 [..], and the sums i32 [.., groups] of the stored values.

    scale = max |x| / 127; a row that is not all finite has the scale NaN. By group, each group is a row in this, and
    scales are [.., groups].
    """
    lead, count, size = x.shape[:-1], format.groups(x.shape[-1]), format.padded(x.shape[-1])
    wide = np.zeros((*lead, size), np.float32)
    wide[..., : x.shape[-1]] = x
    if format.by_group:
        wide = wide.reshape(*lead, count, size // count)
    top = np.abs(wide).max(axis=-1, initial=0)
    finite: Array = np.asarray(np.isfinite(wide).all(axis=-1))
    scale = np.where(finite, top * np.float32(1 / LARGEST), np.float32(np.nan)).astype(np.float32)
    usable = finite & (top > 0)
    factor = np.divide(np.float32(LARGEST), top, out=np.zeros_like(top), where=usable)
    stored = np.rint(np.where(finite[..., None], wide, 0) * factor[..., None]).astype(np.int8)
    sums = stored.reshape(*lead, count, size // count).sum(axis=-1, dtype=np.int32)
    return stored.reshape(*lead, size), scale, sums
