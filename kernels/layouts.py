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


def interleave_glu(weight: Array) -> Array:
    """[2*F, in], gate rows then up rows, to the row order of the `glu` layout, [glu_rows(F), in]."""
    f = weight.shape[0] // 2
    blocks = -(-f // GLU_HALF)
    halves = np.zeros((2, blocks * GLU_HALF, weight.shape[1]), weight.dtype)
    halves[:, :f] = weight.reshape(2, f, weight.shape[1])
    mixed = halves.reshape(2, blocks, GLU_HALF, weight.shape[1]).transpose(1, 0, 2, 3)
    return np.ascontiguousarray(mixed.reshape(2 * blocks * GLU_HALF, weight.shape[1]))


def pack_glu(weight: Array) -> Array:
    """[2*F, in] to the `glu` layout."""
    return pack_panels(interleave_glu(weight))


@dataclass(frozen=True)
class Quantization:
    """A form of quantized weights, named "q8" (one scale per row), "q4g32" (a scale for 32 of a row), "q4g128z" ...

    A weight is (stored - zero) * scale. `stored` has `bits` bits, unsigned; `zero` is the middle of its range, or, with
    `zeros`, a number of its own for each group. As bytes, a panel of 64 rows is, group by group: 64 scales (f32 where a
    group is the whole row, else f16), 64 zeros (u8, with `zeros`), then the values: quads of 4 along `in` for each of
    the 64 rows; at 4 bits the byte of a value also holds, in its high half, the value 4 further along `in`.
    """

    bits: int
    group: int = 0  # along `in`; 0: the whole row
    zeros: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (4, 8) or self.group < 0 or self.group % STEP:
            raise XllmError("unsupported", f"no weights of {self.bits} bits in groups of {self.group}")

    def __str__(self) -> str:
        return f"q{self.bits}{f'g{self.group}' if self.group else ''}{'z' if self.zeros else ''}"

    @staticmethod
    def parse(name: str) -> Quantization:
        """The inverse of str()."""
        match = re.fullmatch(r"q(\d+)(?:g(\d+))?(z?)", name)
        if match is None:
            raise XllmError("internal", f"{name!r} is not a form of quantized weights")
        return Quantization(int(match[1]), int(match[2] or 0), bool(match[3]))

    @property
    def middle(self) -> int:
        """The stored value of 0 where there are no zeros."""
        return 1 << (self.bits - 1)

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
        return self.header_bytes + PANEL * (self.group or self.padded(in_)) * self.bits // 8

    def panel_bytes(self, in_: int) -> int:
        return self.groups(in_) * self.group_bytes(in_)

    def shape(self, out: int, in_: int) -> tuple[int, ...]:
        """The shape of a packed [out, in_] weight, in bytes."""
        return (-(-out // PANEL), self.panel_bytes(in_))


def pack_quantized(q: Quantization, values: Array, scales: Array, zeros: Array | None = None) -> Array:
    """`values` u8 [out, in], `scales` f32 or f16 [out, groups], `zeros` u8 [out, groups], to panels of bytes.

    Rows and columns that fill up panels and groups have scale 0, so that whatever they hold counts for nothing.
    """
    out, in_ = values.shape
    panels, groups, padded = -(-out // PANEL), q.groups(in_), q.padded(in_)
    whole = np.full((panels * PANEL, padded), q.middle, np.uint8)
    whole[:out, :in_] = values
    header = np.zeros((panels * PANEL, groups), np.float16 if q.group else np.float32)
    header[:out] = scales
    quads = whole.reshape(panels, PANEL, groups, -1, QUAD).transpose(0, 2, 3, 1, 4)  # panel, group, quad, row, 4
    if q.bits == 4:
        quads = quads[:, :, 0::2] | (quads[:, :, 1::2] << 4)
    parts = [_columns(header, panels, groups).view(np.uint8).reshape(panels, groups, -1)]
    if q.zeros:
        assert zeros is not None, f"{q} needs zeros"
        padding = np.zeros((panels * PANEL, groups), np.uint8)
        padding[:out] = zeros
        parts.append(_columns(padding, panels, groups))
    parts.append(quads.reshape(panels, groups, -1))
    return np.ascontiguousarray(np.concatenate(parts, axis=2).reshape(panels, -1))


def unpack_quantized(q: Quantization, packed: Array, out: int, in_: int) -> tuple[Array, Array, Array | None]:
    """The inverse of `pack_quantized`: values [out, in], scales and zeros [out, groups] (no zeros: None)."""
    panels, groups = packed.shape[0], q.groups(in_)
    blocks = packed.reshape(panels, groups, -1)
    head = np.ascontiguousarray(blocks[:, :, : PANEL * q.scale_bytes])
    scales = _rows(head.view(np.float16 if q.group else np.float32))
    zeros = _rows(blocks[:, :, PANEL * q.scale_bytes : q.header_bytes]) if q.zeros else None
    quads = blocks[:, :, q.header_bytes :].reshape(panels, groups, -1, PANEL, QUAD)
    if q.bits == 4:
        quads = np.stack([quads & 15, quads >> 4], axis=3).reshape(panels, groups, -1, PANEL, QUAD)
    values = quads.transpose(0, 3, 1, 2, 4).reshape(panels * PANEL, -1)
    return (
        np.ascontiguousarray(values[:out, :in_]),
        np.ascontiguousarray(scales[:out]),
        None if zeros is None else np.ascontiguousarray(zeros[:out]),
    )


def _rows(columns: Array) -> Array:
    """[panels, groups, 64] to [rows, groups]."""
    return columns.transpose(0, 2, 1).reshape(columns.shape[0] * PANEL, -1)


def _columns(table: Array, panels: int, groups: int) -> Array:
    """[rows, groups] to [panels, groups, 64]."""
    return np.ascontiguousarray(table.reshape(panels, PANEL, groups).transpose(0, 2, 1))
