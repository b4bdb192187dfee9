"""How quantized checkpoints pack integers and 8-bit floats, in numpy. Owns the bit orders; must not know names, files.

All results are as ir/quant has them: stored values u8 [out, in], zero points u8 [out, groups], scales [out, groups].
"""

from __future__ import annotations

from typing import Final

import numpy as np

from xllm_compiler.frontend.checkpoint import Array

# AutoAWQ, awq/modules/linear/gemm.py: the i-th nibble of a word is the column _AWQ_ORDER[i] of its eight.
_AWQ_ORDER: Final = (0, 2, 4, 6, 1, 3, 5, 7)
_ROWS: Final = 512  # rows dequantized in one go


def lanes(words: Array, bits: int) -> Array:
    """i32 [.., n] to u8 [.., n * 32 / bits], the lowest bits of a word first."""
    octets = np.ascontiguousarray(words).astype("<i4", copy=False).view(np.uint8)
    if bits == 8:
        return octets
    out = np.empty((*octets.shape, 2), np.uint8)
    np.bitwise_and(octets, 15, out=out[..., 0])
    np.right_shift(octets, 4, out=out[..., 1])
    return out.reshape(*octets.shape[:-1], -1)


def awq_columns(words: Array) -> Array:
    """AWQ's i32 [rows, columns / 8] to u8 [columns, rows]."""
    found = lanes(words, 4).reshape(words.shape[0], -1, 8)
    out = np.empty_like(found)
    out[..., list(_AWQ_ORDER)] = found
    return np.ascontiguousarray(out.reshape(words.shape[0], -1).T)


def gptq_rows(words: Array, bits: int) -> Array:
    """GPTQ's i32 [in * bits / 32, out], packed along in, to u8 [out, in]."""
    return lanes(np.ascontiguousarray(words.T), bits)


def gptq_zeros(words: Array, bits: int, v1: bool) -> Array:
    """GPTQ's i32 [groups, out * bits / 32] to u8 [out, groups].

    Format v1 stores zero points less one, within their bits: AutoGPTQ adds one and masks (qlinear_cuda_old.py).
    """
    found = lanes(words, bits)
    if v1:
        found = (found + np.uint8(1)) & np.uint8((1 << bits) - 1)
    return np.ascontiguousarray(found.T)


def compressed_rows(words: Array, bits: int, count: int) -> Array:
    """compressed-tensors' i32 [rows, ceil(count * bits / 32)], packed along rows, to u8 [rows, count]."""
    return np.ascontiguousarray(lanes(words, bits)[:, :count])


def unsigned(values: Array, bits: int) -> Array:
    """Signed 8-bit integers of `bits` bits, as u8 that count from the lowest."""
    middle = 1 << (bits - 1)
    return (values.view(np.uint8) + np.uint8(middle)).astype(np.uint8, copy=False)


def power_scales(stored: Array) -> Array:
    """Scales that are stored as the exponents of powers of two (ue8m0)."""
    return np.ldexp(np.float32(1), stored.view(np.uint8).astype(np.int32) - 127).astype(np.float32)


def dequantize_floats(values: Array, scales: Array, block: tuple[int, int], dtype: np.dtype[np.generic]) -> Array:
    """8-bit floats [out, in] times the scale [rows of blocks, columns of blocks] of their block, rounded to `dtype`."""
    out, in_ = values.shape
    high, wide = block
    result = np.empty((out, in_), dtype)
    columns = np.repeat(scales.astype(np.float32), wide, axis=1)[:, :in_]
    for start in range(0, out, _ROWS):
        stop = min(out, start + _ROWS)
        each = columns[np.arange(start, stop) // high]
        result[start:stop] = values[start:stop].astype(np.float32) * each
    return result


def dequantize_integers(
    values: Array, scales: Array, zeros: Array, group_of: Array, dtype: np.dtype[np.generic]
) -> Array:
    """(values - zero) * scale, where column i belongs to the group `group_of[i]`, rounded to `dtype`."""
    result = np.empty(values.shape, dtype)
    for start in range(0, values.shape[0], _ROWS):
        part = slice(start, start + _ROWS)
        point, scale = (x[part].astype(np.float32)[:, group_of] for x in (zeros, scales))
        result[part] = (values[part].astype(np.float32) - point) * scale
    return result
