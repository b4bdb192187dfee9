"""Packs weights into layouts and unpacks them, in numpy.

`xllm_compiler.weight_formats` has the layouts and weight formats, with their shapes. A new format is packed here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from xllm_compiler.kernels.grids import from_grids, to_grids
from xllm_compiler.weight_formats import (
    GLU_HALF,
    PANEL,
    QUAD,
    GridFormat,
    IntegerFormat,
    Layout,
    WeightFormat,
    panel_shape,
)

Array = npt.NDArray[Any]


def pack(layout: Layout, parts: Sequence[Array]) -> Array:
    """The stored array of a weight. `parts`: the weight [out, in]; or a quantized one's integers, scales, and zero
    points if any. Raises "internal" if the integers are not of the format."""
    if not layout.panels:
        return parts[0]
    if layout.glu:
        fills = [layout.format.zero if layout.format is not None else 0, 0, 0]
        parts = [interleave_glu(part, fill) for part, fill in zip(parts, fills, strict=False)]
    return pack_panels(parts[0]) if layout.format is None else pack_quantized(layout.format, *parts)


def unpack(layout: Layout, packed: Array, shape: tuple[int, ...]) -> list[Array]:
    """The inverse of `pack`, for a weight of `shape`."""
    if not layout.panels:
        return [packed.reshape(shape)]
    out, in_ = shape
    rows = layout.rows(out)
    if layout.format is None:
        parts = [unpack_panels(packed, rows, in_)]
    else:
        parts = [part for part in unpack_quantized(layout.format, packed, rows, in_) if part is not None]
    return [_separate_glu(part, out) for part in parts] if layout.glu else parts


def pack_panels(weight: Array) -> Array:
    """[out, in] to panels of the same dtype (float32, or a 2-byte type holding bf16)."""
    out, in_ = weight.shape
    shape = panel_shape(out, in_, "f32" if weight.dtype.itemsize == 4 else "bf16")
    depth = shape[1] * (shape[3] if len(shape) == 4 else 1)
    padded = np.zeros((shape[0] * PANEL, depth), weight.dtype)
    padded[:out, :in_] = weight
    if len(shape) == 3:
        return np.ascontiguousarray(padded.reshape(shape[0], PANEL, depth).transpose(0, 2, 1))
    return np.ascontiguousarray(padded.reshape(shape[0], PANEL, shape[1], 2).transpose(0, 2, 1, 3))


def unpack_panels(packed: Array, out: int, in_: int) -> Array:
    """The inverse of `pack_panels`."""
    if packed.ndim == 3:
        rows = packed.transpose(0, 2, 1).reshape(packed.shape[0] * PANEL, -1)
    else:
        rows = packed.transpose(0, 2, 1, 3).reshape(packed.shape[0] * PANEL, -1)
    return np.ascontiguousarray(rows[:out, :in_])


def interleave_glu(weight: Array, fill: int = 0) -> Array:
    """[2*F, in], gate rows then up rows, to the row order of the `glu` layout, [glu_rows(F), in]. Padding rows are
    `fill`."""
    f = weight.shape[0] // 2
    blocks = -(-f // GLU_HALF)
    halves = np.full((2, blocks * GLU_HALF, weight.shape[1]), fill, weight.dtype)
    halves[:, :f] = weight.reshape(2, f, weight.shape[1])
    mixed = halves.reshape(2, blocks, GLU_HALF, weight.shape[1]).transpose(1, 0, 2, 3)
    return np.ascontiguousarray(mixed.reshape(2 * blocks * GLU_HALF, weight.shape[1]))


def _separate_glu(mixed: Array, out: int) -> Array:
    """The inverse of `interleave_glu`: gate rows, then up rows, `out` rows together."""
    columns = mixed.shape[1]
    halves = mixed.reshape(-1, 2, GLU_HALF, columns).transpose(1, 0, 2, 3).reshape(2, -1, columns)
    return np.ascontiguousarray(halves[:, : out // 2].reshape(out, columns))


def pack_quantized(format: WeightFormat, values: Array, scales: Array, zeros: Array | None = None) -> Array:
    """`values` u8 [out, in], `scales` f32 or f16 [out, groups], `zeros` u8 [out, groups], to panels of bytes.

    Rows and columns that pad panels and groups have scale 0, so that their values do not count. Raises "internal" if a
    run of `GridFormat` is on no grid.
    """
    match format:
        case IntegerFormat():
            return _pack_integers(format, values, scales, zeros)
        case GridFormat():
            return _pack_on_grids(format, values, scales)
    raise AssertionError(format)


def unpack_quantized(format: WeightFormat, packed: Array, out: int, in_: int) -> tuple[Array, Array, Array | None]:
    """The inverse of `pack_quantized`: values [out, in], scales and zeros [out, groups] (no zeros: None)."""
    panels, groups = packed.shape[0], format.groups(in_)
    blocks = packed.reshape(panels, groups, -1)
    scale_bytes = PANEL * format.scale_bytes
    scales = _rows(np.ascontiguousarray(blocks[:, :, :scale_bytes]).view(np.float16 if format.group else np.float32))
    zeros = _rows(blocks[:, :, scale_bytes : format.header_bytes]) if format.zeros else None
    stored = blocks[:, :, format.header_bytes :]
    match format:
        case IntegerFormat():
            values = _from_quads(stored, format.bits)
        case GridFormat():
            values = _unpack_runs(format, stored[:, 0], in_)
        case _:
            raise AssertionError(format)
    return (
        np.ascontiguousarray(values[:out, :in_]),
        np.ascontiguousarray(scales[:out]),
        None if zeros is None else np.ascontiguousarray(zeros[:out]),
    )


def _pack_integers(format: IntegerFormat, values: Array, scales: Array, zeros: Array | None) -> Array:
    panels, groups = -(-len(values) // PANEL), format.groups(values.shape[1])
    whole = _padded(values, panels * PANEL, format.padded(values.shape[1]), format.zero)
    parts = [_scales(format, scales, panels, groups)]
    if format.zeros:
        assert zeros is not None, f"{format} needs zeros"
        parts.append(_columns(_padded(zeros, panels * PANEL, groups, 0), panels, groups))
    parts.append(_to_quads(whole, panels, groups, format.bits))
    return np.ascontiguousarray(np.concatenate(parts, axis=2).reshape(panels, -1))


def _pack_on_grids(format: GridFormat, values: Array, scales: Array) -> Array:
    panels, runs = -(-len(values) // PANEL), format.runs(values.shape[1])
    whole, heads = to_grids(_padded(values, panels * PANEL, runs * format.grid, format.zero), format.grid)
    quads = _to_quads(whole, panels, runs, format.bits)
    stored = np.concatenate((_turned(_columns(heads, panels, runs)), quads), axis=2).reshape(panels, -1)
    made = np.concatenate((_scales(format, scales, panels, 1)[:, 0], stored), axis=1)
    return np.ascontiguousarray(made[:, : format.panel_bytes(values.shape[1])])  # the last run may be half a one


def _unpack_runs(format: GridFormat, stored: Array, in_: int) -> Array:
    panels, count = len(stored), format.runs(in_)
    filled = np.zeros((panels, count * format.run_bytes), np.uint8)
    filled[:, : stored.shape[1]] = stored
    runs = filled.reshape(panels, count, -1)
    return from_grids(_from_quads(runs[:, :, PANEL:], format.bits), _rows(_turned(runs[:, :, :PANEL])), format.grid)


def _padded(table: Array, rows: int, columns: int, fill: int) -> Array:
    whole = np.full((rows, columns), fill, table.dtype)
    whole[: table.shape[0], : table.shape[1]] = table
    return whole


def _scales(format: WeightFormat, scales: Array, panels: int, groups: int) -> Array:
    """As bytes, [panels, groups, bytes]."""
    table = _padded(scales.astype(np.float16 if format.group else np.float32), panels * PANEL, groups, 0)
    return _columns(table, panels, groups).view(np.uint8).reshape(panels, groups, -1)


def _to_quads(values: Array, panels: int, groups: int, bits: int) -> Array:
    """[panels * 64, k] to bytes [panels, groups, bytes]: a quad along k for each of 64 rows; of 4 bits two quads."""
    quads = values.reshape(panels, PANEL, groups, -1, QUAD).transpose(0, 2, 3, 1, 4)
    if bits == 4:
        quads = quads[:, :, 0::2] | (quads[:, :, 1::2] << 4)
    return quads.reshape(panels, groups, -1)


def _from_quads(stored: Array, bits: int) -> Array:
    """The inverse of `_to_quads`."""
    panels, groups, _ = stored.shape
    quads = stored.reshape(panels, groups, -1, PANEL, QUAD)
    if bits == 4:
        quads = np.stack([quads & 15, quads >> 4], axis=3).reshape(panels, groups, -1, PANEL, QUAD)
    return quads.transpose(0, 3, 1, 2, 4).reshape(panels * PANEL, -1)


def _turned(heads: Array) -> Array:
    """[panels, runs, 64] grid heads, from the order of columns to that of the stored bytes. It is its own inverse."""
    return heads.reshape(*heads.shape[:2], 4, 4, 4).swapaxes(2, 3).reshape(heads.shape)


def _rows(columns: Array) -> Array:
    """[panels, groups, 64] to [rows, groups]."""
    return columns.transpose(0, 2, 1).reshape(columns.shape[0] * PANEL, -1)


def _columns(table: Array, panels: int, groups: int) -> Array:
    """[rows, groups] to [panels, groups, 64]."""
    return np.ascontiguousarray(table.reshape(panels, PANEL, groups).transpose(0, 2, 1))
