"""The sums of a linear layer with AMX: the loop over k and the role of each tile register.

A block is up to 32 rows by a panel of 64 columns. Up to 16 rows are multiplied by all four 16-column tiles of the panel
at once. More rows are multiplied by half the panel at a time: two tiles of rows by two of columns. Either way a row's
sums are made by the same instructions in the same order, for every number of rows. linear.py uses the sums.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

from tvm.tirx.script.builder import ir as T

from xllm_compiler.kernels.tir.codegen.amx import TILE_BYTES, TILE_ROWS, TileShapes, dot, load_tile, store_tile, zero
from xllm_compiler.kernels.tir.codegen.builder import address, load, splat, stack_array
from xllm_compiler.kernels.tir.isa.levels import LANES
from xllm_compiler.kernels.tir.linear.blocks import MOST_BYTES, BlockSums
from xllm_compiler.kernels.tir.linear.grid_bytes import unpack_runs
from xllm_compiler.weight_formats import PANEL, GridFormat, IntegerFormat, WeightFormat

Expr = Any
STEP_BYTES = PANEL * 4  # of a panel, from one 4-byte piece of k to the next
_SUMS_STRIDE = PANEL * 4


def narrow_shape(here: Expr, width: int) -> list[tuple[Expr, int]]:
    """Shapes for up to 16 rows: sums in 0..3, `width` bytes of the rows in 4, columns in 5..7."""
    return [(here, TILE_BYTES)] * 4 + [(here, width)] + [(T.int32(width // 4), TILE_BYTES)] * 3


def wide_shape(here: Expr, width: int) -> list[tuple[Expr, int]]:
    """Shapes for 17 to 32 rows: sums in 0..3, two tiles of rows in 4 and 5, columns in 6 and 7."""
    upper, lower = T.int32(TILE_ROWS), here - TILE_ROWS
    both = [(upper, TILE_BYTES)] * 2 + [(lower, TILE_BYTES)] * 2
    return [*both, (upper, width), (lower, width)] + [(T.int32(width // 4), TILE_BYTES)] * 2


class AmxWholeRows(BlockSums):
    """The sums over all of k in one go: bf16, and 8-bit weights with a scale per row."""

    def __init__(self, kind: str, row_bytes: int, env: dict[str, Expr]) -> None:
        """`row_bytes`: of a row of x, a multiple of 4."""
        self._kind = kind
        self.row_bytes = row_bytes
        self._env = env
        self._x, self._w = env["x"], env["w"]
        self._element = 2 if kind == "bf16" else 1
        self._whole, self._rest = divmod(row_bytes, TILE_BYTES)
        self._shapes = TileShapes()

    @abstractmethod
    def values_at(self, panel: Expr) -> Expr:
        """The byte at which the values of a panel begin."""

    def emit(self, row: Expr, here: Expr, panel: Expr, place: tuple[Expr, Expr], sums: Expr) -> None:
        rows = T.bind(T.Cast("int64", row) * self.row_bytes)
        weights = T.bind(self.values_at(panel))
        with T.If(here <= TILE_ROWS):
            with T.Then():
                self._narrow(rows, here, weights, sums)
            with T.Else():
                for half in range(2):
                    self._wide(rows, here, weights, half * (PANEL // 2), sums)

    def release(self) -> None:
        self._shapes.release()

    def _narrow(self, rows: Expr, here: Expr, weights: Expr, sums: Expr) -> None:
        """All columns by one tile of rows: sums in 0..3, rows in 4, columns in 5, 6 and 7 in rotation."""
        columns = range(PANEL // TILE_ROWS)

        def add(step: Expr) -> None:
            load_tile(4, self._row(rows, step), self.row_bytes)
            for column in columns:
                load_tile(5 + column % 3, self._weight(weights, step, column * LANES), STEP_BYTES)
                dot(self._kind, column, 4, 5 + column % 3)

        places = [(tile, T.int32(tile * LANES)) for tile in columns]
        self._sum(here * 4, partial(narrow_shape, here), add, places, sums)

    def _wide(self, rows: Expr, here: Expr, weights: Expr, first: int, sums: Expr) -> None:
        """32 columns by two tiles of rows: sums in 0..3, rows in 4 and 5, columns in 6 and 7."""

        def add(step: Expr) -> None:
            for j in range(2):
                load_tile(6 + j, self._weight(weights, step, first + j * LANES), STEP_BYTES)
            for i in range(2):
                load_tile(4 + i, self._row(rows + i * TILE_ROWS * self.row_bytes, step), self.row_bytes)
                for j in range(2):
                    dot(self._kind, 2 * i + j, 4 + i, 6 + j)

        places = [(2 * i + j, T.int32(i * TILE_ROWS * PANEL + first + j * LANES)) for i in range(2) for j in range(2)]
        self._sum(here * 4 + 1, partial(wide_shape, here), add, places, sums)

    def _sum(
        self,
        key: Expr,
        shape: Callable[[int], list[tuple[Expr, int]]],
        add: Callable[[Expr], None],
        places: list[tuple[int, Expr]],
        sums: Expr,
    ) -> None:
        """The loop over k, then the rest that does not fill a register. The rest has tile shapes of its own, so the
        sums go through memory in between."""
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
        at = weights + T.Cast("int64", step) * (TILE_ROWS * STEP_BYTES) + column * 4
        return address(self._w, T.truncdiv(at, T.int64(self._element)))


class AmxDense(AmxWholeRows):
    """bf16 rows by bf16 weights."""

    def __init__(self, k: int, env: dict[str, Expr]) -> None:
        super().__init__("bf16", 2 * k, env)

    def values_at(self, panel: Expr) -> Expr:
        return T.Cast("int64", panel) * (PANEL * self.row_bytes)

    def totals(self, row: Expr, panel: Expr, sums: list[Expr]) -> list[Expr]:
        return sums


class AmxBytes(AmxWholeRows):
    """8-bit rows by 8-bit weights. Each row of the weight has a scale, and a zero point in some formats."""

    def __init__(self, format: IntegerFormat | GridFormat, k: int, env: dict[str, Expr]) -> None:
        super().__init__("i8u8", format.padded(k), env)
        self._format: WeightFormat = format
        self._panel_bytes = format.panel_bytes(k)

    def values_at(self, panel: Expr) -> Expr:
        return self._start(panel) + self._format.header_bytes

    def totals(self, row: Expr, panel: Expr, sums: list[Expr]) -> list[Expr]:
        return byte_totals(self._format, self._panel_bytes, self._env, row, panel, sums)

    def _start(self, panel: Expr) -> Expr:
        return T.Cast("int64", panel) * self._panel_bytes


class AmxGrids(AmxBytes):
    """Weights on grids. A panel is unpacked to bytes once, for all rows that are multiplied by it."""

    fewest = 13  # with fewer rows vector registers are faster

    def __init__(self, format: GridFormat, k: int, env: dict[str, Expr]) -> None:
        super().__init__(format, k, env)
        self._grids, self._packed, self._padded = format, env["w"], format.padded(k)
        self._w = stack_array(PANEL * self._padded, "uint8")

    @staticmethod
    def can(format: GridFormat, k: int) -> bool:
        """Whether an unpacked panel fits the stack."""
        return PANEL * format.padded(k) <= MOST_BYTES

    def begin(self, panel: Expr) -> None:
        start = T.bind(self._start(panel) + self._format.header_bytes)
        unpack_runs(self._grids, self._packed, start, self._padded, self._w)

    def values_at(self, panel: Expr) -> Expr:
        return T.int64(0)


def byte_totals(
    format: WeightFormat, panel_bytes: int, env: dict[str, Expr], row: Expr, panel: Expr, sums: list[Expr]
) -> list[Expr]:
    """A row's products with a panel of 8-bit weights. `sums` are sums of the stored integers, their bits read as
    f32."""
    w = env["w"]
    start = T.bind(T.Cast("int64", panel) * panel_bytes)
    total = T.bind(env["xsum"][row])
    scale = T.bind(splat(env["xs"][row]))
    made = []
    for vector, bits in enumerate(sums):
        whole = T.reinterpret("int32x16", bits)
        if format.zeros:
            at = start + PANEL * format.scale_bytes + vector * LANES
            zeros = T.call_extern("int32x16", "xllm_load_u8", address(w, at))
            whole = whole - zeros * T.broadcast(total, LANES)
        else:
            whole = whole - T.broadcast(total * format.zero, LANES)
        columns = load(w, start + vector * LANES * format.scale_bytes, format.scale_dtype)
        made.append(T.bind(T.Cast("float32x16", whole) * columns * scale))
    return made
