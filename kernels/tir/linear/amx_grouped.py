"""The sums of a linear layer with AMX, for weights that AMX cannot multiply as they are stored. These are 4-bit weights
in groups by 8-bit rows, and quantized weights by bf16 rows.

A panel is unpacked once, to signed bytes or bf16, and then multiplied by all rows. The sums of one group become f32,
are multiplied by the group's scales, and are added in the order of the groups. AMX works one group ahead of that
arithmetic, in the other half of a double buffer.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from tvm.tirx.script.builder import ir as T

from xllm_compiler.kernels.tir.codegen.amx import TILE_BYTES, TILE_ROWS, TileShapes, dot, load_tile, store_tile, zero
from xllm_compiler.kernels.tir.codegen.builder import address, fma, load, splat, stack_array, store
from xllm_compiler.kernels.tir.isa.levels import LANES
from xllm_compiler.kernels.tir.linear.amx import STEP_BYTES, narrow_shape, wide_shape
from xllm_compiler.kernels.tir.linear.blocks import BLOCK_ROWS, MOST_BYTES, BlockSums
from xllm_compiler.kernels.tir.linear.stored_values import unpack_group
from xllm_compiler.weight_formats import PANEL, QUAD, IntegerFormat, WeightFormat

Expr = Any
_PART = BLOCK_ROWS * PANEL


class _Groups(BlockSums):
    """What both kinds of rows share. `row_bytes`: bytes of a row of x. `length`: how many of them are in one group."""

    kind: str
    element_bytes: int

    def __init__(self, format: WeightFormat, k: int, env: dict[str, Expr], row_bytes: int, length: int) -> None:
        self._format = format
        self._env = env
        self.row_bytes, self._length = row_bytes, length
        self._groups = row_bytes // length
        self._panel_bytes, self._group_bytes = format.panel_bytes(k), format.group_bytes(k)
        self._bytes = stack_array(PANEL * row_bytes, "int8")
        self._parts = stack_array(2 * _PART, "int32")
        self._shapes = TileShapes()

    @abstractmethod
    def unpack(self, start: Expr, target: Expr) -> None:
        """Emits: writes the group that begins at byte `start` of the weight, less its zero points, as AMX reads it.
        For each 4 bytes along k come those of the 64 columns."""

    def totals(self, row: Expr, panel: Expr, sums: list[Expr]) -> list[Expr]:
        return sums

    @abstractmethod
    def as_float(self, part: Expr) -> Expr:
        """16 sums of an AMX tile, as f32."""

    def begin(self, panel: Expr) -> None:
        with T.serial(0, self._groups) as group:
            start = T.bind(self._group_at(panel, group))
            self.unpack(start, T.bind(T.Cast("int64", group) * (self._length * PANEL)))

    def emit(self, row: Expr, here: Expr, panel: Expr, place: tuple[Expr, Expr], sums: Expr) -> None:
        rows = T.bind(T.Cast("int64", row) * self.row_bytes)
        with T.serial(0, here * (PANEL // LANES)) as vector:
            store(sums, vector * LANES, splat(0.0), "f32")
        self._tiles(rows, here, T.int32(0))
        with T.serial(0, self._groups) as group:
            with T.If(group < self._groups - 1), T.Then():
                self._tiles(rows, here, T.bind(group + 1))
            self._add(here, panel, group, sums)

    def release(self) -> None:
        self._shapes.release()

    def _group_at(self, panel: Expr, group: Expr) -> Expr:
        return T.Cast("int64", panel) * self._panel_bytes + T.Cast("int64", group) * self._group_bytes

    def _tiles(self, rows: Expr, here: Expr, group: Expr) -> None:
        """The sums of one group, into its half of the double buffer."""
        part = T.bind(T.bitwise_and(group, T.int32(1)) * _PART)
        width = min(self._length, TILE_BYTES)
        steps = self._length // width
        with T.If(here <= TILE_ROWS):
            with T.Then():
                self._shapes.set(here * 2, narrow_shape(here, width))
                for tile in range(4):
                    zero(tile)
                with T.serial(0, steps) as step:
                    load_tile(4, self._row(rows, group, step, 0), self.row_bytes)
                    for column in range(4):
                        load_tile(5 + column % 3, self._weight(group, step, column), STEP_BYTES)
                        dot(self.kind, column, 4, 5 + column % 3)
                for tile in range(4):
                    store_tile(tile, address(self._parts, part + tile * LANES), PANEL * 4)
            with T.Else():
                self._shapes.set(here * 2 + 1, wide_shape(here, width))
                for first in (0, 2):
                    for tile in range(4):
                        zero(tile)
                    with T.serial(0, steps) as step:
                        for j in range(2):
                            load_tile(6 + j, self._weight(group, step, first + j), STEP_BYTES)
                        for i in range(2):
                            load_tile(4 + i, self._row(rows, group, step, i * TILE_ROWS), self.row_bytes)
                            for j in range(2):
                                dot(self.kind, 2 * i + j, 4 + i, 6 + j)
                    for i in range(2):
                        for j in range(2):
                            at = part + (i * TILE_ROWS * PANEL + (first + j) * LANES)
                            store_tile(2 * i + j, address(self._parts, at), PANEL * 4)

    def _row(self, rows: Expr, group: Expr, step: Expr, below: int) -> Expr:
        at = rows + T.Cast("int64", group) * self._length + step * TILE_BYTES + below * self.row_bytes
        return address(self._env["x"], T.truncdiv(at, T.int64(self.element_bytes)))

    def _weight(self, group: Expr, step: Expr, column: int) -> Expr:
        at = T.Cast("int64", group) * (self._length * PANEL) + step * (PANEL * TILE_BYTES) + column * TILE_BYTES
        return address(self._bytes, at)

    def _add(self, here: Expr, panel: Expr, group: Expr, sums: Expr) -> None:
        """sums += the group's sums * its scales."""
        w, format = self._env["w"], self._format
        start = T.bind(self._group_at(panel, group))
        scales = [
            T.bind(load(w, start + v * LANES * format.scale_bytes, format.scale_dtype)) for v in range(PANEL // LANES)
        ]
        part = T.bind(T.bitwise_and(group, T.int32(1)) * _PART)
        with T.serial(0, here) as i:
            for vector, scale in enumerate(scales):
                at = T.bind(i * PANEL + vector * LANES)
                whole = T.call_extern("int32x16", "xllm_load_i32", address(self._parts, part + at))
                store(sums, at, fma(self.as_float(whole), scale, load(sums, at, "f32")), "f32")


def _fits(length: int, row_bytes: int) -> bool:
    """Whether a group is a part of a tile or whole tiles, rows are whole groups, and an unpacked panel fits the
    stack."""
    tiles = length <= TILE_BYTES or length % TILE_BYTES == 0
    return tiles and row_bytes % length == 0 and PANEL * row_bytes <= MOST_BYTES


class AmxRoundedRows(_Groups):
    """4-bit weights in groups by 8-bit rows. AMX's sums are exact, and what follows is done as without AMX."""

    kind = "i8i8"
    element_bytes = 1
    fewest = 13  # with fewer rows, unpacking a panel costs more than it saves

    def __init__(self, format: IntegerFormat, k: int, env: dict[str, Expr]) -> None:
        super().__init__(format, k, env, format.padded(k), format.group)

    @staticmethod
    def can(format: IntegerFormat, k: int) -> bool:
        """Whether weights have 4 bits, in groups that AMX can take."""
        return format.bits == 4 and format.group > 0 and _fits(format.group, format.padded(k))

    def unpack(self, start: Expr, target: Expr) -> None:
        format, w = self._format, self._env["w"]
        zeros = [self._zeros(start, vector) for vector in range(PANEL // LANES)]
        values = T.bind(start + format.header_bytes)
        with T.serial(0, format.group // (2 * QUAD)) as step:
            for vector, zero_points in enumerate(zeros):
                at = values + step * STEP_BYTES + vector * TILE_BYTES
                both = T.bind(T.call_extern("int32x16", "xllm_load_i32", address(w, at)))
                for half in range(2):
                    to = target + (step * 2 + half) * STEP_BYTES + vector * TILE_BYTES
                    part = T.shift_right(both, T.broadcast(T.int32(4), LANES)) if half else both
                    low = T.bitwise_and(part, T.broadcast(T.int32(0x0F0F0F0F), LANES))
                    name = "xllm_store_bytes_less"
                    T.evaluate(T.call_extern("int32", name, address(self._bytes, to), low, zero_points))

    def _zeros(self, start: Expr, vector: int) -> Expr:
        """Four times the zero point of each of 16 columns."""
        if not self._format.zeros:
            return T.broadcast(T.int32(self._format.zero * 0x01010101), LANES)
        at = start + PANEL * self._format.scale_bytes + vector * LANES
        points = T.call_extern("int32x16", "xllm_load_u8", address(self._env["w"], at))
        return T.bind(points * T.broadcast(T.int32(0x01010101), LANES))

    def as_float(self, part: Expr) -> Expr:
        return T.Cast("float32x16", part)

    def emit(self, row: Expr, here: Expr, panel: Expr, place: tuple[Expr, Expr], sums: Expr) -> None:
        super().emit(row, here, panel, place, sums)
        # The product goes through memory, as without AMX: else LLVM would fuse it with the bias that is added to it.
        with T.serial(0, here) as i:
            scale = T.bind(splat(self._env["xs"][row + i]))
            for vector in range(PANEL // LANES):
                at = T.bind(i * PANEL + vector * LANES)
                store(sums, at, load(sums, at, "f32") * scale, "f32")


class AmxFloatRows(_Groups):
    """Weights in any format by bf16 rows."""

    kind = "bf16"
    element_bytes = 2

    def __init__(self, format: WeightFormat, k: int, env: dict[str, Expr]) -> None:
        super().__init__(format, k, env, 2 * k, 2 * (format.group or k))

    @staticmethod
    def can(format: WeightFormat, k: int) -> bool:
        """Whether rows are whole steps of stored values, in groups that AMX can take."""
        return k % (QUAD * 8 // format.bits) == 0 and _fits(2 * (format.group or k), 2 * k)

    def unpack(self, start: Expr, target: Expr) -> None:
        unpack_group(self._format, self._env["w"], start, self._length // 2, self._bytes, target)

    def as_float(self, part: Expr) -> Expr:
        return T.reinterpret("float32x16", part)
