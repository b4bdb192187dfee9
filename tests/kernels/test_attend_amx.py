"""Attention in rows of tiles: what a row does not see must not reach it through a product with 0, and rows must not
notice which tile they are in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from attend_case import Case
from levels import LEVELS

LENGTH = 150


@pytest.fixture(scope="module", params=LEVELS)
def case(request: pytest.FixtureRequest) -> Case:
    """Two query heads to a KV head, tails in K and V, a window that begins and ends within blocks."""
    return Case((LENGTH,), request.param, "bf16", 4, 2, 72, 40, window=90)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("token", [0, 20, 63, 64, 127, 149])
def test_unseen_values_do_not_leak(case: Case, token: int, value: float) -> None:
    """A value that is not finite reaches the tokens that see it, and no other of the same step by a single bit."""
    everything = [(0, 0, LENGTH)]
    (clean,) = case.run(everything)
    pool = case.pool.copy()
    layout = case.kernel.kernel.kv  # type: ignore[attr-defined]
    page = int(case.table[0, token // 16])
    elements = case.pool.view(case.dtype)
    try:
        for head in range(layout.heads):
            base = (case.before + page * case.stride + head * layout.head_bytes) // 2 + 16 * layout.k_dim
            slot = token % 16
            # pairs of tokens: one column's two values are neighbours
            elements[base + (slot // 2 * layout.v_dim + 3) * 2 + slot % 2] = value
        (dirty,) = case.run(everything)
        sees = [t for t in range(LENGTH) if t - 90 < token <= t]
        blind = [t for t in range(LENGTH) if t not in sees]
        assert dirty[blind].tobytes() == clean[blind].tobytes()
        assert not np.isfinite(dirty[sees][..., 3].astype(np.float32)).any()
        others = [c for c in range(layout.v_dim) if c != 3]
        assert dirty[sees][..., others].tobytes() == clean[sees][..., others].tobytes()
        parts: list[Any] = [(0, 0, 17), (0, 60, 66), (0, 149, 150)]
        for _, first, last in parts:
            (alone,) = case.run([(0, first, last)])
            assert alone.tobytes() == dirty[first:last].tobytes()
    finally:
        case.pool[:] = pool


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 15, 16, 23, 24, 25, 33])
def test_tiles_do_not_show(case: Case, rows: int) -> None:
    """Two rows a token: steps that fill one, two or three tiles of 16 rows, or a query block of 48, or nearly."""
    (whole,) = case.run([(0, 0, LENGTH)])
    for first in (0, 40, 63, 89, LENGTH - rows):
        (part,) = case.run([(0, first, first + rows)], 2)
        assert part.tobytes() == whole[first : first + rows].tobytes()
