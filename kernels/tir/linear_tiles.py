"""The sums of a linear layer by AMX tiles. Owns the loop over k and the registers' roles; what is done with the sums is
linear.py's.

Up to 32 rows by a panel of 64 columns at a time: up to 16 rows meet all four 16-column tiles of the panel at once; more
meet half the panel at a time, two tiles of rows by two of columns. A row's sums are made by the same instructions in
the same order in either case, and for every number of rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from xllm_compiler.kernels.tir.base import LANES, PANEL
from xllm_compiler.kernels.tir.emit import address
from xllm_compiler.kernels.tir.tiles import TILE_BYTES, TILE_ROWS, TileShapes, dot, load_tile, store_tile, zero

Expr = Any
BLOCK_ROWS = 2 * TILE_ROWS
_STEP_BYTES = PANEL * 4  # of a panel, from one 4-byte piece of k to the next
_SUMS_STRIDE = PANEL * 4


@dataclass(frozen=True)
class TilePanel:
    """How a weight format's panels are read: `kind` of dot product, bytes of k in a row of x and of a panel's column
    (multiples of 4), and where the values of a panel begin."""

    kind: str
    row_bytes: int
    first: Callable[[Expr], Expr]


class TileSums:
    """Emits sums[i, column] = x[row + i] @ the panel for `here` rows; 4-byte sums of the dot product's own type."""

    def __init__(self, panel: TilePanel, x: Expr, w: Expr) -> None:
        self._panel = panel
        self._x = x
        self._w = w
        self._element = 2 if panel.kind == "bf16" else 1
        self._whole, self._rest = divmod(panel.row_bytes, TILE_BYTES)
        self._shapes = TileShapes()

    def emit(self, row: Expr, here: Expr, panel: Expr, sums: Expr) -> None:
        rows = T.bind(T.Cast("int64", row) * self._panel.row_bytes)
        weights = T.bind(self._panel.first(panel))
        with T.If(here <= TILE_ROWS):
            with T.Then():
                self._narrow(rows, here, weights, sums)
            with T.Else():
                for half in range(2):
                    self._wide(rows, here, weights, half * (PANEL // 2), sums)

    def release(self) -> None:
        """At the end of the kernel."""
        self._shapes.release()

    def _narrow(self, rows: Expr, here: Expr, weights: Expr, sums: Expr) -> None:
        """All columns by one tile of rows: sums in 0..3, rows in 4, columns in 5, 6 and 7 by turns."""
        columns = range(PANEL // TILE_ROWS)

        def shape(width: int) -> list[tuple[Expr, int]]:
            pieces = T.int32(width // 4)
            return [(here, TILE_BYTES)] * 4 + [(here, width)] + [(pieces, TILE_BYTES)] * 3

        def add(step: Expr) -> None:
            load_tile(4, self._row(rows, step), self._panel.row_bytes)
            for column in columns:
                load_tile(5 + column % 3, self._weight(weights, step, column * LANES), _STEP_BYTES)
                dot(self._panel.kind, column, 4, 5 + column % 3)

        places = [(tile, T.int32(tile * LANES)) for tile in columns]
        self._sum(here * 4, shape, add, places, sums)

    def _wide(self, rows: Expr, here: Expr, weights: Expr, first: int, sums: Expr) -> None:
        """32 columns by two tiles of rows: sums in 0..3, rows in 4 and 5, columns in 6 and 7."""
        lower = here - TILE_ROWS

        def shape(width: int) -> list[tuple[Expr, int]]:
            pieces = T.int32(width // 4)
            both = [(T.int32(TILE_ROWS), TILE_BYTES)] * 2 + [(lower, TILE_BYTES)] * 2
            return [*both, (T.int32(TILE_ROWS), width), (lower, width), (pieces, TILE_BYTES), (pieces, TILE_BYTES)]

        def add(step: Expr) -> None:
            for j in range(2):
                load_tile(6 + j, self._weight(weights, step, first + j * LANES), _STEP_BYTES)
            for i in range(2):
                load_tile(4 + i, self._row(rows + i * TILE_ROWS * self._panel.row_bytes, step), self._panel.row_bytes)
                for j in range(2):
                    dot(self._panel.kind, 2 * i + j, 4 + i, 6 + j)

        places = [(2 * i + j, T.int32(i * TILE_ROWS * PANEL + first + j * LANES)) for i in range(2) for j in range(2)]
        self._sum(here * 4 + 1, shape, add, places, sums)

    def _sum(
        self,
        key: Expr,
        shape: Callable[[int], list[tuple[Expr, int]]],
        add: Callable[[Expr], None],
        places: list[tuple[int, Expr]],
        sums: Expr,
    ) -> None:
        """The loop over k, then what does not fill a register: with shapes of its own, by way of memory."""
        if self._whole:
            self._shapes.set(key, shape(TILE_BYTES))
            for tile, _ in places:
                zero(tile)
            with T.serial(0, self._whole) as step:
                add(step)
            for tile, at in places:
                store_tile(tile, address(sums, at), _SUMS_STRIDE)
        if self._rest:
            self._shapes.set(key + 2, shape(self._rest))
            for tile, at in places:
                if self._whole:
                    load_tile(tile, address(sums, at), _SUMS_STRIDE)
                else:
                    zero(tile)
            add(T.int32(self._whole))
            for tile, at in places:
                store_tile(tile, address(sums, at), _SUMS_STRIDE)

    def _row(self, rows: Expr, step: Expr) -> Expr:
        return address(self._x, T.truncdiv(rows, T.int64(self._element)) + step * (TILE_BYTES // self._element))

    def _weight(self, weights: Expr, step: Expr, column: int) -> Expr:
        at = weights + T.Cast("int64", step) * (TILE_ROWS * _STEP_BYTES) + column * 4
        return address(self._w, T.truncdiv(at, T.int64(self._element)))
