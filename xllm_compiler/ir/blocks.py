"""Work on a large array, a block of rows at a time, on all processors."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

_BLOCK: Final = 1 << 17  # numbers looked at in one go: what is computed of them stays near a core


def in_blocks(rows: int, length: int, block: Callable[[slice], None], least: int = 1) -> None:
    """`block` of some rows of `length` numbers after the other, at least `least` of them, side by side on all
    processors."""
    size = max(least, _BLOCK // max(length, 1))
    parts = [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
    if len(parts) > 1:
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            list(pool.map(block, parts))
    elif parts:
        block(parts[0])
