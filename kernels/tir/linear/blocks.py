"""`BlockSums`: the sums of a linear layer for a block of rows at a time. Owns what kernels ask of it, and no sums."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from xllm_compiler.kernels.tir.codegen.amx import TILE_ROWS

Expr = Any
BLOCK_ROWS = 2 * TILE_ROWS
MOST_BYTES = 1 << 20  # of a panel taken apart, which lies on the stack
_CACHED_BYTES = 1 << 20  # of rows that meet one panel after the other: half of a second-level cache


class BlockSums(ABC):
    """Sums of up to `block_rows` rows of x by one panel. `row_bytes`: of a row of x. With fewer than `fewest` rows, or
    more than `greatest`, each few that registers hold better meet the whole panel; only where that gives the same bits.
    """

    block_rows: int = BLOCK_ROWS
    row_bytes: int
    fewest: int = 1
    greatest: int | None = None

    @property
    def most_rows(self) -> int:
        """Rows that meet all panels before others do: blocks are so fast that they must come from the second-level
        cache."""
        return max(1, _CACHED_BYTES // (self.row_bytes * self.block_rows)) * self.block_rows

    def take(self, top: Expr, here: Expr) -> None:
        """Emitted before any of the `here` <= `most_rows` rows from `top` on meet panels; most have nothing to do."""
        return

    def begin(self, panel: Expr) -> None:
        """Emitted before the rows that meet `panel`; most have nothing to prepare."""
        return

    @abstractmethod
    def emit(self, row: Expr, here: Expr, panel: Expr, place: tuple[Expr, Expr], sums: Expr) -> None:
        """sums[i, column] = x[row + i] @ the panel for `here` rows: 4 bytes each, of a type that `totals` knows.
        `place`: which of how many times this is that rows meet this panel."""

    @abstractmethod
    def totals(self, row: Expr, panel: Expr, sums: list[Expr]) -> list[Expr]:
        """A row's sums as f32, from the four vectors of them, read as f32."""

    def release(self) -> None:
        """Emitted at the end of the kernel: gives back what was taken."""
        return
