"""Bytes on grids, in numpy: the 4-bit numbers, step and point that stand for a run of bytes.

A byte is 128 + (n - point) * step, with n in 0 .. 15. A run of bytes shares a step of 1 .. 15 and a point of 0 .. 15.
128, which stands for 0, is on every grid.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from xllm_compiler.errors import XllmError
from xllm_compiler.weight_formats import GridFormat

MIDDLE: Final = GridFormat.as_bytes.zero
MOST: Final = GridFormat.most

Array = npt.NDArray[Any]

_SIZES: Final = np.abs(np.arange(256) - MIDDLE)
_DIVISORS: Final[Array] = np.bitwise_or.reduce(
    [(_SIZES % step == 0).astype(np.uint16) << step for step in range(1, MOST + 1)]
)
"""For each byte a word: bit `step` says whether the byte's distance from the middle is a multiple of `step`."""


def to_grids(values: Array, grid: int) -> tuple[Array, Array]:
    """For bytes [rows, k], the numbers n u8 [rows, k] and the heads step + 16 * point u8 [rows, k / grid], with the
    smallest step that fits. Raises "internal" if a run is on no grid."""
    rows, k = values.shape
    runs = np.ascontiguousarray(values.reshape(rows, -1, grid).transpose(2, 0, 1))  # side by side
    low = MIDDLE - np.minimum(runs.min(axis=0), MIDDLE).astype(np.int16)
    high = np.maximum(runs.max(axis=0), MIDDLE).astype(np.int16) - MIDDLE
    common = np.bitwise_and.reduce(_DIVISORS[runs], axis=0)
    steps = np.zeros(low.shape, np.int16)
    for step in range(MOST, 0, -1):
        steps[(common >> step & 1).astype(bool) & (low + high <= MOST * step)] = step
    if not steps.all():
        row, run = np.argwhere(steps == 0)[0]
        raise XllmError("internal", f"row {row}, run {run} of {grid}: {runs[:, row, run].tolist()} are on no grid")
    points = low // steps
    n = (runs - np.float32(MIDDLE)) * (1 / steps.astype(np.float32)) + points.astype(np.float32)
    whole = np.rint(n, out=n).astype(np.uint8).transpose(1, 2, 0)
    return whole.reshape(rows, k), (steps + 16 * points).astype(np.uint8)


def from_grids(n: Array, heads: Array, grid: int) -> Array:
    """The inverse of `to_grids`."""
    steps, points = (heads & 15).astype(np.int16), (heads >> 4).astype(np.int16)
    runs = (n.reshape(len(n), -1, grid) - points[:, :, None]) * steps[:, :, None] + MIDDLE
    return np.asarray(runs.astype(np.uint8).reshape(n.shape))
