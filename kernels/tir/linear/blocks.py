"""`BlockSums`: the interface of what computes a linear layer's sums for a block of rows at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from xllm_compiler.kernels.tir.codegen.amx import TILE_ROWS

Expr = Any
BLOCK_ROWS = 2 * TILE_ROWS
MOST_BYTES = 1 << 20  # of an unpacked panel, which lies on the stack
_CACHED_BYTES = 1 << 20  # of rows that stay in the second-level cache for all panels: half of it


class BlockSums(ABC):
    """Sums of up to `block_rows` rows of x by one panel. `row_bytes`: bytes of a row of x.

    With fewer than `fewest` rows, or more than `greatest`, register tiles are faster and are used instead. A class may
    set these limits only where register tiles give the same bits.
    """

    block_rows: int = BLOCK_ROWS
    row_bytes: int
    fewest: int = 1
    greatest: int | None = None

    @property
    def most_rows(self) -> int:
        """How many rows are multiplied by all panels before the next rows are. Blocks are so fast that these rows must
        come from the second-level cache."""
        return max(1, _CACHED_BYTES // (self.row_bytes * self.block_rows)) * self.block_rows

    def take(self, top: Expr, here: Expr) -> None:
        """Emits what must be done before any panel is multiplied by the `here` <= `most_rows` rows from row `top` on.
        Most classes do nothing."""
        return

    def begin(self, panel: Expr) -> None:
        """Emits what must be done before rows are multiplied by `panel`. Most classes do nothing."""
        return

    @abstractmethod
    def emit(self, row: Expr, here: Expr, panel: Expr, place: tuple[Expr, Expr], sums: Expr) -> None:
        """Emits sums[i, column] = x[row + i] @ the panel for `here` rows: 4 bytes each, of a type that `totals` knows.
        `place`: the block's number among those that are multiplied by this panel, and how many there are."""

    @abstractmethod
    def totals(self, row: Expr, panel: Expr, sums: list[Expr]) -> list[Expr]:
        """A row's sums as f32. `sums` are its four vectors, their bits read as f32."""

    def release(self) -> None:
        """Emits what must be given back at the end of the kernel."""
        return
