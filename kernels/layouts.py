"""How weights lie in memory: numpy packing into panels and back. Owns the layouts; must not know kernels or files.

    row     as in the checkpoint, [out, in]
    panel   bf16 [ceil(out/64), ceil(in/2), 64, 2], f32 [ceil(out/64), in, 64]; padded with zeros
    glu     the gate rows and the up rows of a [2*F, in] matrix interleaved 32 by 32, F padded to a multiple of 32,
            then `panel`: each panel holds 32 gate columns and the 32 up columns that belong to them

A panel is read front to back by one stream, and pairs along `in` are what the bf16 dot instruction takes. All
instruction set levels read the same bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from xllm_compiler.errors import XllmError

PANEL = 64
GLU_HALF = PANEL // 2

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
