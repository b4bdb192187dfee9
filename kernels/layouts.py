"""How weights lie in memory: numpy packing into panels and back. Owns the layouts; must not know kernels or files.

    row     as in the checkpoint, [out, in]
    panel   bf16 [ceil(out/64), ceil(in/2), 64, 2], f32 [ceil(out/64), in, 64]; padded with zeros
    glu     the gate rows and the up rows of a [2*F, in] matrix interleaved 32 by 32, F padded to a multiple of 32,
            then `panel`: each panel holds 32 gate columns and the 32 up columns that belong to them

    q8 q4g32 ...   panels of a quantized weight, see `Quantization`; glu_q8 ...: of one interleaved as for `glu`

A panel is read front to back by one stream, and pairs along `in` are what the bf16 dot instruction takes. All
instruction set levels read the same bytes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from xllm_compiler.errors import XllmError
from xllm_compiler.kernels.grids import GRIDS, from_grids, to_grids

PANEL = 64
GLU_HALF = PANEL // 2
QUAD = 4  # 8-bit values that the integer dot instruction takes at once, along `in`
STEP = 16  # rows of quantized activations are stored in pieces of so many values

Array = npt.NDArray[Any]


def panel_shape(out: int, in_: int, dtype: str) -> tuple[int, ...]:
    """The shape of a packed [out, in_] weight; `dtype` is "bf16" or "f32"."""
    panels = -(-out // PANEL)
    if dtype == "bf16":
        return (panels, -(-in_ // 2), PANEL, 2)
    if dtype == "f32":
        return (panels, in_, PANEL)
    raise XllmError("unsupported", f"no panel layout for {dtype} weights")


def glu_rows(f: int) -> int:
    """Rows of the interleaved matrix for F = `f` gate columns."""
    return 2 * GLU_HALF * -(-f // GLU_HALF)


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
    """[2*F, in], gate rows then up rows, to the row order of the `glu` layout, [glu_rows(F), in]; rows that are added
    hold `fill`."""
    f = weight.shape[0] // 2
    blocks = -(-f // GLU_HALF)
    halves = np.full((2, blocks * GLU_HALF, weight.shape[1]), fill, weight.dtype)
    halves[:, :f] = weight.reshape(2, f, weight.shape[1])
    mixed = halves.reshape(2, blocks, GLU_HALF, weight.shape[1]).transpose(1, 0, 2, 3)
    return np.ascontiguousarray(mixed.reshape(2 * blocks * GLU_HALF, weight.shape[1]))


def pack_glu(weight: Array) -> Array:
    """[2*F, in] to the `glu` layout."""
    return pack_panels(interleave_glu(weight))


@dataclass(frozen=True)
class Quantization:
    """A form of quantized weights, named "q8" (one scale per row), "q4g32" (a scale for 32 of a row), "q4g128z",
    "q4grid16" ...

    A weight is (stored - zero) * scale. `stored` has `bits` bits, unsigned; `zero` is the middle of its range, or, with
    `zeros`, a number of its own for each group. As bytes, a panel of 64 rows is, group by group: 64 scales (f32 where a
    group is the whole row, else f16), 64 zeros (u8, with `zeros`), then the values: quads of 4 along `in` for each of
    the 64 rows; at 4 bits the byte of a value also holds, in its high half, the value 4 further along `in`.

    With `grid` a weight is that of 8 bits with a scale per row, but every `grid` values of a row are (n - point) * step
    from the middle, where n has 4 bits and the run a step of 1 .. 15 and a point of 0 .. 15 (ir/quant.py). A panel is
    64 scales, and then for each run the 64 bytes step + 16 * point, and the n as above. Those bytes are in the order
    in which shuffles within 16 bytes bring each to its column: of column 16 a + 4 b + c it is number 16 b + 4 a + c.
    """

    bits: int
    group: int = 0  # along `in`; 0: the whole row
    zeros: bool = False
    grid: int = 0  # along `in`

    def __post_init__(self) -> None:
        if self.bits not in (4, 8) or self.group < 0 or self.group % STEP:
            raise XllmError("unsupported", f"no weights of {self.bits} bits in groups of {self.group}")
        if self.grid and (self.grid not in GRIDS or self.bits != 4 or self.group or self.zeros):
            raise XllmError("unsupported", f"no grids of {self.grid} in weights of {self.bits} bits by {self.group}")

    def __str__(self) -> str:
        group, grid = f"g{self.group}" if self.group else "", f"grid{self.grid}" if self.grid else ""
        return f"q{self.bits}{group}{'z' if self.zeros else ''}{grid}"

    @staticmethod
    def parse(name: str) -> Quantization:
        """The inverse of str()."""
        match = re.fullmatch(r"q(\d+)(?:g(\d+))?(z?)(?:grid(\d+))?", name)
        if match is None:
            raise XllmError("internal", f"{name!r} is not a form of quantized weights")
        return Quantization(int(match[1]), int(match[2] or 0), bool(match[3]), int(match[4] or 0))

    @property
    def multiplied(self) -> Quantization:
        """The form in which values are multiplied: of a grid, bytes."""
        return Quantization(8) if self.grid else self

    @property
    def middle(self) -> int:
        """The value of 0 where there are no zeros, as it is multiplied."""
        return 1 << (self.multiplied.bits - 1)

    @property
    def scale_dtype(self) -> str:
        return "f16" if self.group else "f32"

    @property
    def scale_bytes(self) -> int:
        return 2 if self.group else 4

    @property
    def rows_by_group(self) -> bool:
        """Whether 8-bit rows that meet the weight have a scale for each group, as those of 8-bit weights in groups."""
        return self.bits == 8 and self.group > 0

    @property
    def header_bytes(self) -> int:
        """Scales and zeros of one group of a panel."""
        return PANEL * (self.scale_bytes + self.zeros)

    def padded(self, in_: int) -> int:
        """`in` rounded up to whole groups; activations have rows of this length."""
        unit = self.group or STEP
        return -(-in_ // unit) * unit

    def groups(self, in_: int) -> int:
        return self.padded(in_) // self.group if self.group else 1

    def group_bytes(self, in_: int) -> int:
        """Bytes of one group of a panel."""
        return self.header_bytes + PANEL * (self.runs(in_) + (self.group or self.padded(in_)) * self.bits // 8)

    def runs(self, in_: int) -> int:
        """Runs of a row on grids, of which the last may be half a one; 0 without grids."""
        return -(-self.padded(in_) // self.grid) if self.grid else 0

    @property
    def run_bytes(self) -> int:
        """Bytes of one run of a panel on grids, its steps and points first."""
        return PANEL * (1 + self.grid // 2)

    def panel_bytes(self, in_: int) -> int:
        return self.groups(in_) * self.group_bytes(in_)

    def shape(self, out: int, in_: int) -> tuple[int, ...]:
        """The shape of a packed [out, in_] weight, in bytes."""
        return (-(-out // PANEL), self.panel_bytes(in_))


def pack_quantized(q: Quantization, values: Array, scales: Array, zeros: Array | None = None) -> Array:
    """`values` u8 [out, in], `scales` f32 or f16 [out, groups], `zeros` u8 [out, groups], to panels of bytes.

    Rows and columns that fill up panels and groups have scale 0, so that whatever they hold counts for nothing. With
    `grid` the values are bytes; raises "internal" where a run of them is on no grid.
    """
    out, in_ = values.shape
    panels, groups, padded = -(-out // PANEL), q.groups(in_), q.padded(in_)
    runs, length = (q.runs(in_), q.grid) if q.grid else (groups, padded // groups)
    whole = np.full((panels * PANEL, runs * length), q.middle, np.uint8)
    whole[:out, :in_] = values
    header = np.zeros((panels * PANEL, groups), np.float16 if q.group else np.float32)
    header[:out] = scales
    parts = [_columns(header, panels, groups).view(np.uint8).reshape(panels, groups, -1)]
    if q.zeros:
        assert zeros is not None, f"{q} needs zeros"
        padding = np.zeros((panels * PANEL, groups), np.uint8)
        padding[:out] = zeros
        parts.append(_columns(padding, panels, groups))
    if q.grid:
        whole, heads = to_grids(whole, q.grid)
    quads = whole.reshape(panels, PANEL, runs, -1, QUAD).transpose(0, 2, 3, 1, 4)  # panel, run, quad, row, 4
    if q.bits == 4:
        quads = quads[:, :, 0::2] | (quads[:, :, 1::2] << 4)
    stored = quads.reshape(panels, runs, -1)
    if q.grid:
        stored = np.concatenate((_turned(_columns(heads, panels, runs)), stored), axis=2).reshape(panels, 1, -1)
        stored = stored[:, :, : q.panel_bytes(in_) - q.header_bytes]  # the last run may be half a one
    return np.ascontiguousarray(np.concatenate((*parts, stored), axis=2).reshape(panels, -1))


def unpack_quantized(q: Quantization, packed: Array, out: int, in_: int) -> tuple[Array, Array, Array | None]:
    """The inverse of `pack_quantized`: values [out, in], scales and zeros [out, groups] (no zeros: None)."""
    panels, groups = packed.shape[0], q.groups(in_)
    blocks = packed.reshape(panels, groups, -1)
    head = np.ascontiguousarray(blocks[:, :, : PANEL * q.scale_bytes])
    scales = _rows(head.view(np.float16 if q.group else np.float32))
    zeros = _rows(blocks[:, :, PANEL * q.scale_bytes : q.header_bytes]) if q.zeros else None
    stored = blocks[:, :, q.header_bytes :]
    if q.grid:
        groups = q.runs(in_)
        filled = np.zeros((panels, groups * q.run_bytes), np.uint8)
        filled[:, : stored.shape[2]] = stored[:, 0]
        runs = filled.reshape(panels, groups, -1)
        heads, stored = _rows(_turned(runs[:, :, :PANEL])), runs[:, :, PANEL:]
    quads = stored.reshape(panels, groups, -1, PANEL, QUAD)
    if q.bits == 4:
        quads = np.stack([quads & 15, quads >> 4], axis=3).reshape(panels, groups, -1, PANEL, QUAD)
    values = quads.transpose(0, 3, 1, 2, 4).reshape(panels * PANEL, -1)
    if q.grid:
        values = from_grids(values, heads, q.grid)
    return (
        np.ascontiguousarray(values[:out, :in_]),
        np.ascontiguousarray(scales[:out]),
        None if zeros is None else np.ascontiguousarray(zeros[:out]),
    )


def _turned(heads: Array) -> Array:
    """[panels, runs, 64] of a grid, from the order of columns to that of its bytes, and back."""
    return heads.reshape(*heads.shape[:2], 4, 4, 4).swapaxes(2, 3).reshape(heads.shape)


def _rows(columns: Array) -> Array:
    """[panels, groups, 64] to [rows, groups]."""
    return columns.transpose(0, 2, 1).reshape(columns.shape[0] * PANEL, -1)


def _columns(table: Array, panels: int, groups: int) -> Array:
    """[rows, groups] to [panels, groups, 64]."""
    return np.ascontiguousarray(table.reshape(panels, PANEL, groups).transpose(0, 2, 1))
