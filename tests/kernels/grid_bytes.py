"""Random bytes on grids, of all steps and points that bytes allow."""

from __future__ import annotations

import numpy as np


def bytes_on_grids(rng: np.random.Generator, rows: int, k: int, grid: int) -> np.ndarray:
    """u8 [rows, k]; every `grid` of a row are 128 + (n - point) * step, with n from 0 to 15."""
    shape = rows, -(-k // grid), 1
    step = rng.integers(1, 16, shape)
    least, most = np.maximum(0, 15 - 127 // step), np.minimum(15, 128 // step)
    point = least + rng.integers(0, 16, shape) % (most - least + 1)
    n = rng.integers(0, 16, (*shape[:2], grid))
    return np.ascontiguousarray(((n - point) * step + 128).reshape(rows, -1)[:, :k].astype(np.uint8))
