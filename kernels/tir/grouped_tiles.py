"""The sums of a linear layer with 4-bit weights in groups, by AMX tiles. Owns how groups meet tiles.

A panel is taken apart once into signed bytes, which then meet all rows. The tiles' sums of one group are exact; they
become f32, are multiplied by the group's scales and added up in the order of the groups, exactly as without tiles. The
tiles go one group ahead of that arithmetic, into the other half of a buffer.
"""

from __future__ import annotations

from typing import Any

from tvm.tirx.script.builder import ir as T

from xllm_compiler.kernels.layouts import QUAD, Quantization
from xllm_compiler.kernels.tir.base import LANES, PANEL
from xllm_compiler.kernels.tir.emit import address, fma, load, splat, stack_array, store
from xllm_compiler.kernels.tir.linear_tiles import BLOCK_ROWS, STEP_BYTES, TileSums
from xllm_compiler.kernels.tir.tiles import TILE_BYTES, TILE_ROWS, TileShapes, dot, load_tile, store_tile, zero

Expr = Any
_MOST_BYTES = 1 << 20  # of a panel taken apart, which lies on the stack
_PART = BLOCK_ROWS * PANEL


class GroupedTiles(TileSums):
    """4-bit weights in groups by 8-bit rows."""

    @staticmethod
    def can(q: Quantization, k: int) -> bool:
        """Whether groups are whole tiles or fit one, and the panel fits the stack."""
        fits = q.group <= TILE_BYTES or q.group % TILE_BYTES == 0
        return q.bits == 4 and q.group > 0 and fits and PANEL * q.padded(k) <= _MOST_BYTES

    def __init__(self, q: Quantization, k: int, env: dict[str, Expr]) -> None:
        self._q = q
        self._env = env
        self._padded, self._groups = q.padded(k), q.groups(k)
        self._panel_bytes, self._group_bytes = q.panel_bytes(k), q.group_bytes(k)
        self._bytes = stack_array(PANEL * self._padded, "int8")
        self._parts = stack_array(2 * _PART, "int32")
        self._shapes = TileShapes()

    def begin(self, panel: Expr) -> None:
        """Takes the panel apart: for each quad along k the 4 bytes of its 64 columns, less their zero points."""
        q, w = self._q, self._env["w"]
        with T.serial(0, self._groups) as group:
            start = T.bind(self._group_at(panel, group))
            zeros = [self._zeros(start, vector) for vector in range(PANEL // LANES)]
            values = T.bind(start + q.header_bytes)
            target = T.bind(T.Cast("int64", group) * (q.group * PANEL))
            with T.serial(0, q.group // (2 * QUAD)) as step:
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
        if not self._q.zeros:
            return T.broadcast(T.int32(self._q.middle * 0x01010101), LANES)
        at = start + PANEL * self._q.scale_bytes + vector * LANES
        points = T.call_extern("int32x16", "xllm_load_u8", address(self._env["w"], at))
        return T.bind(points * T.broadcast(T.int32(0x01010101), LANES))

    def emit(self, row: Expr, here: Expr, panel: Expr, sums: Expr) -> None:
        rows = T.bind(T.Cast("int64", row) * self._padded)
        with T.serial(0, here * (PANEL // LANES)) as vector:
            store(sums, vector * LANES, splat(0.0), "f32")
        self._tiles(rows, here, T.int32(0))
        with T.serial(0, self._groups) as group:
            with T.If(group < self._groups - 1), T.Then():
                self._tiles(rows, here, T.bind(group + 1))
            self._add(here, panel, group, sums)

    def totals(self, row: Expr, panel: Expr, sums: list[Expr]) -> list[Expr]:
        scale = T.bind(splat(self._env["xs"][row]))
        return [total * scale for total in sums]

    def release(self) -> None:
        self._shapes.release()

    def _group_at(self, panel: Expr, group: Expr) -> Expr:
        return T.Cast("int64", panel) * self._panel_bytes + T.Cast("int64", group) * self._group_bytes

    def _tiles(self, rows: Expr, here: Expr, group: Expr) -> None:
        """The sums of one group into the half of the buffer that is its turn."""
        part = T.bind(T.bitwise_and(group, T.int32(1)) * _PART)
        width = min(self._q.group, TILE_BYTES)
        pieces = T.int32(width // QUAD)
        with T.If(here <= TILE_ROWS):
            with T.Then():
                shape = [(here, TILE_BYTES)] * 4 + [(here, width)] + [(pieces, TILE_BYTES)] * 3
                self._shapes.set(here * 2, shape)
                for tile in range(4):
                    zero(tile)
                with T.serial(0, self._q.group // width) as step:
                    load_tile(4, self._row(rows, group, step, 0), self._padded)
                    for column in range(4):
                        load_tile(5 + column % 3, self._weight(group, step, column), STEP_BYTES)
                        dot("i8i8", column, 4, 5 + column % 3)
                for tile in range(4):
                    store_tile(tile, address(self._parts, part + tile * LANES), PANEL * 4)
            with T.Else():
                lower = here - TILE_ROWS
                both = [(T.int32(TILE_ROWS), TILE_BYTES)] * 2 + [(lower, TILE_BYTES)] * 2
                shape = [*both, (T.int32(TILE_ROWS), width), (lower, width)] + [(pieces, TILE_BYTES)] * 2
                self._shapes.set(here * 2 + 1, shape)
                for first in (0, 2):
                    for tile in range(4):
                        zero(tile)
                    with T.serial(0, self._q.group // width) as step:
                        for j in range(2):
                            load_tile(6 + j, self._weight(group, step, first + j), STEP_BYTES)
                        for i in range(2):
                            load_tile(4 + i, self._row(rows, group, step, i * TILE_ROWS), self._padded)
                            for j in range(2):
                                dot("i8i8", 2 * i + j, 4 + i, 6 + j)
                    for i in range(2):
                        for j in range(2):
                            at = part + (i * TILE_ROWS * PANEL + (first + j) * LANES)
                            store_tile(2 * i + j, address(self._parts, at), PANEL * 4)

    def _row(self, rows: Expr, group: Expr, step: Expr, below: int) -> Expr:
        at = rows + T.Cast("int64", group) * self._q.group + step * TILE_BYTES + below * self._padded
        return address(self._env["x"], at)

    def _weight(self, group: Expr, step: Expr, column: int) -> Expr:
        at = T.Cast("int64", group) * (self._q.group * PANEL) + step * (PANEL * TILE_BYTES) + column * TILE_BYTES
        return address(self._bytes, at)

    def _add(self, here: Expr, panel: Expr, group: Expr, sums: Expr) -> None:
        """sums += the group's integers * its scales."""
        w, q = self._env["w"], self._q
        start = T.bind(self._group_at(panel, group))
        scales = [T.bind(load(w, start + v * LANES * q.scale_bytes, q.scale_dtype)) for v in range(PANEL // LANES)]
        part = T.bind(T.bitwise_and(group, T.int32(1)) * _PART)
        with T.serial(0, here) as i:
            for vector, scale in enumerate(scales):
                at = T.bind(i * PANEL + vector * LANES)
                whole = T.call_extern("int32x16", "xllm_load_i32", address(self._parts, part + at))
                store(sums, at, fma(T.Cast("float32x16", whole), scale, load(sums, at, "f32")), "f32")
