"""The sums of a linear layer in vector registers, one slice of a panel at a time.

A slice is a part of a panel that the first-level cache holds. All rows of a block are multiplied by it before the next
slice is read. Meanwhile the partial sums lie in memory.

    SlicedBytes   8-bit weights by 8-bit rows, where bytes are multiplied faster than the second-level cache gives them,
                  or where there are few more rows than a register tile has. Tiles read a slice again from the
                  first-level cache, while memory is read front to back
    SlicedGrids   4-bit weights on grids, which are unpacked to bytes
    SlicedPairs   bf16 by bf16 for few rows, for the same reason
    SlicedFloats  bf16 by bf16 for more rows, where no instruction multiplies bf16. A slice is widened to f32 once for
                  all rows of the block, and a row once for all columns, and not both for every product

Each sum is made by the same operations in the same order as without slices, so no bit depends on slices.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from tvm.tirx.script.builder import ir as T

from xllm_compiler.kernels.tir.codegen.builder import (
    Vectors,
    address,
    choose,
    fma,
    halves,
    load,
    load_part,
    splat,
    stack_array,
    store,
    tile_sizes,
)
from xllm_compiler.kernels.tir.isa.levels import LANES, Isa
from xllm_compiler.kernels.tir.linear.amx import byte_totals
from xllm_compiler.kernels.tir.linear.blocks import MOST_BYTES, BlockSums
from xllm_compiler.kernels.tir.linear.grid_bytes import unpack_runs
from xllm_compiler.kernels.tir.linear.reader import Prefetch, PrefetchOf, in_blocks
from xllm_compiler.kernels.tir.linear.widened_rows import WideRows
from xllm_compiler.weight_formats import PANEL, GridFormat, IntegerFormat

Expr = Any
_VECTORS = PANEL // LANES
_SLICE_BYTES = 1 << 14  # of a slice of bytes, at levels where only few rows use slices
WIDEN_ROWS = 12  # at least, for widening a panel of bf16 to pay
_NEVER = 0x7FFFFFFF  # more rows than there can be
_BLOCK_ROWS = 48  # at most: a slice, the rows' part of it and their sums are then some 40 KiB


def _slice_bytes(isa: Isa) -> int:
    """Bytes of a slice of 8-bit weights."""
    return isa.slice_bytes or _SLICE_BYTES


@dataclass(frozen=True)
class _Piece:
    """A slice, and the rows that are multiplied by it: `length` values of k of a panel from `begin` on, and the rows of
    x from `row` on."""

    row: Expr
    panel: Expr
    begin: Expr
    length: Expr | int
    shortest: int  # the least that `length` can be


class _Sliced(BlockSums):
    """`height`: rows of a register tile; a block has several. `width(rows)`: vectors of a register tile of `rows`
    rows."""

    kind: str  # of the sums: i32 or f32
    row_bytes: int

    def __init__(
        self, env: dict[str, Expr], k: int, length: int, height: int, width: Callable[[int], int], prefetch: PrefetchOf
    ) -> None:
        """`k`: of a row, padding included. `length`: values of k in one slice."""
        self._env, self._k, self._length, self._prefetch = env, k, min(length, k), prefetch
        self._height, self._width = height, width
        self.block_rows = _BLOCK_ROWS // height * height
        self._sizes = range(1, height + 1)  # of the register tiles that rows come in

    def _take_few(self, fewest: int, greatest: int) -> None:
        """Limits blocks to `fewest` .. `greatest` rows, which saves the code of other register tiles."""
        self.fewest, self.greatest = fewest, greatest
        self._sizes = tile_sizes(range(fewest, greatest + 1), self._height)

    def prepare_slice(self, piece: _Piece, here: Expr) -> None:
        """Emits what must be done before `here` rows are multiplied by a slice; nothing where it is multiplied as it is
        stored."""
        return

    @abstractmethod
    def multiply(
        self, totals: Vectors, piece: _Piece, first: Expr, count: int, vectors: range, prefetch: Prefetch
    ) -> None:
        """Emits totals += `count` rows by the prepared slice. `first`: the number of the first row in the block."""

    def emit(self, row: Expr, here: Expr, panel: Expr, place: tuple[Expr, Expr], sums: Expr) -> None:
        with T.serial(0, here * _VECTORS) as vector:
            store(sums, vector * LANES, splat(0.0), "f32")  # of integers too
        parts = T.bind(T.truncdiv(here + (self._height - 1), T.int32(self._height)))
        whole, rest = divmod(self._k, self._length)
        times, length = self._loops(whole)
        loops = times + (rest > 0)
        tile, tiles = place

        def multiply_slice(begin: Expr, number: Expr, length: Expr | int, shortest: int) -> None:
            piece = _Piece(row, panel, T.bind(begin), length, shortest)
            self.prepare_slice(piece, here)
            with T.serial(0, parts) as part:
                first = T.bind(T.truncdiv(here * part, parts))
                count = T.bind(T.truncdiv(here * (part + 1), parts) - first)
                loop = T.bind((tile * loops + number) * parts + part), tiles * loops * parts
                add = partial(self._add, piece, first, loop, tiles == 1, sums)
                choose(count, {n: partial(add, n) for n in self._sizes})

        with T.serial(0, times) as number:
            multiply_slice(number * length, number, length, self._length)
        if rest:
            multiply_slice(T.int32(whole * self._length), times, rest, rest)

    def _loops(self, slices: int) -> tuple[Expr | int, Expr | int]:
        """How many times rows run along a panel of `slices` whole slices, and over how much of k each time."""
        return slices, self._length

    def _add(self, piece: _Piece, first: Expr, loop: tuple[Expr, Expr], along: Expr, sums: Expr, count: int) -> None:
        """Emits sums += `count` rows by a slice."""
        width = self._width(count)
        passes = _VECTORS // width
        at, of = loop
        dtype = {"i32": "int32", "f32": "float32"}[self.kind]
        for number in range(passes):
            vectors = range(number * width, (number + 1) * width)
            totals = Vectors(count * width, dtype)
            places = [address(sums, (first + i) * PANEL + vector * LANES) for i in range(count) for vector in vectors]
            for index, where in enumerate(places):
                totals[index] = T.call_extern(f"{dtype}x16", f"xllm_load_{self.kind}", where)
            prefetch = self._prefetch(piece.panel, (at * passes + number, of * passes), along)
            self.multiply(totals, piece, first, count, vectors, prefetch)
            for index, where in enumerate(places):
                T.evaluate(T.call_extern("int32", f"xllm_store_{self.kind}", where, totals[index]))

    def totals(self, row: Expr, panel: Expr, sums: list[Expr]) -> list[Expr]:
        return sums


class ByBytes(Protocol):
    """The reader of 8-bit weights: the widths of its register tiles, and their inner loop (integer.py)."""

    def width(self, isa: Isa, rows: int) -> int: ...

    def multiply(
        self,
        env: dict[str, Expr],
        totals: Vectors,
        weights: Expr,
        x_at: Expr,
        k: int,
        count: int,
        at: range,
        length: Expr | int,
        prefetch: Prefetch | None,
    ) -> None: ...


class ByPairs(Protocol):
    """The reader of bf16 weights: the same (dense.py)."""

    def width(self, isa: Isa, rows: int) -> int: ...

    def begins(self, k: int, panel: Expr) -> Expr: ...

    def multiply(
        self,
        env: dict[str, Expr],
        totals: Vectors,
        weights: Expr,
        k: int,
        row: Expr,
        begin: Expr,
        count: int,
        at: range,
        length: int,
        prefetch: Prefetch,
    ) -> None: ...


class SlicedBytes(_Sliced):
    """8-bit rows by 8-bit weights with a scale per row. The sums of stored integers are exact. Where the second-level
    cache is fast enough, slices are for few rows only."""

    kind = "i32"

    def __init__(
        self,
        format: IntegerFormat | GridFormat,
        by_bytes: ByBytes,
        isa: Isa,
        k: int,
        height: int,
        fewest: int,
        env: dict[str, Expr],
        prefetch: PrefetchOf,
    ) -> None:
        """`height`: rows of a register tile for bytes. `fewest`: more rows than a register tile for the weights as they
        are stored has."""
        self._format, self._bytes, self._in = format, by_bytes, k
        padded, length = format.padded(k), _slice_bytes(isa) // PANEL
        super().__init__(env, padded, length, height, partial(by_bytes.width, isa), prefetch)
        self.row_bytes, self.fewest = padded, fewest
        if not isa.slice_bytes:
            self._limit_rows(2 * height)

    def _limit_rows(self, greatest: int) -> None:
        """Limits slices to `greatest` rows. Where the second-level cache is fast, more rows gain nothing by them."""
        self._take_few(self.fewest, greatest)

    @staticmethod
    def pays(format: IntegerFormat, isa: Isa, k: int) -> bool:
        """Whether slices make SlicedBytes faster than register tiles: one instruction multiplies bytes, and a panel is
        more than one slice. A smaller panel stays in the first-level cache by itself."""
        return isa.has_int8_dot and PANEL * format.padded(k) > _slice_bytes(isa)

    def multiply(
        self, totals: Vectors, piece: _Piece, first: Expr, count: int, vectors: range, prefetch: Prefetch
    ) -> None:
        env, weights = self._stored_bytes(piece)
        x_at = T.bind(T.Cast("int64", piece.row + first) * self.row_bytes + piece.begin)
        self._bytes.multiply(env, totals, T.bind(weights), x_at, self._in, count, vectors, piece.length, prefetch)

    def _stored_bytes(self, piece: _Piece) -> tuple[dict[str, Expr], Expr]:
        """An environment whose "w" has the bytes of a slice, and where they begin in it."""
        return self._env, self._values(piece.panel) + T.Cast("int64", piece.begin) * PANEL

    def _values(self, panel: Expr) -> Expr:
        """The byte at which a panel's values begin."""
        return T.Cast("int64", panel) * self._format.panel_bytes(self._in) + self._format.header_bytes

    def emit(self, row: Expr, here: Expr, panel: Expr, place: tuple[Expr, Expr], sums: Expr) -> None:
        super().emit(row, here, panel, place, sums)
        format = self._format
        # The product goes through memory, as without slices: else LLVM would fuse it with the bias that is added to it.
        with T.serial(0, here) as i:
            places = [T.bind(i * PANEL + vector) for vector in range(0, PANEL, LANES)]
            stored = [load(sums, at, "f32") for at in places]
            products = byte_totals(format, format.panel_bytes(self._in), self._env, row + i, panel, stored)
            for at, product in zip(places, products, strict=True):
                store(sums, at, product, "f32")


class SlicedGrids(SlicedBytes):
    """The same for weights on grids. Where there is one block of rows, each slice is unpacked to bytes in the
    first-level cache. With more blocks the panel is unpacked once for all of them. They then use slices of it only
    where the second-level cache is too slow."""

    def __init__(
        self,
        format: GridFormat,
        by_bytes: ByBytes,
        isa: Isa,
        k: int,
        height: int,
        fewest: int,
        env: dict[str, Expr],
        prefetch: PrefetchOf,
    ) -> None:
        super().__init__(format, by_bytes, isa, k, height, fewest, env, prefetch)
        self._grids = format
        whole = PANEL * self._k <= MOST_BYTES
        self._unpacked = stack_array(PANEL * (self._k if whole else self._length), "uint8")
        self._once = T.bind(env["rows"] > (self.block_rows if whole else _NEVER))
        self._along = not isa.slice_bytes

    def _limit_rows(self, greatest: int) -> None:
        """No limit: unpacking grids once for all rows pays for any number of them."""

    def begin(self, panel: Expr) -> None:
        with T.If(self._once), T.Then():
            self._unpack(panel, T.int32(0), self._k)

    def prepare_slice(self, piece: _Piece, here: Expr) -> None:
        with T.If(T.Not(self._once)), T.Then():
            self._unpack(piece.panel, piece.begin, piece.shortest)

    def _unpack(self, panel: Expr, begin: Expr, length: int) -> None:
        grids = self._grids
        start = T.bind(self._values(panel) + T.truncdiv(begin, T.int32(grids.grid)) * grids.run_bytes)
        unpack_runs(grids, self._env["w"], start, length, self._unpacked)

    def _loops(self, slices: int) -> tuple[Expr | int, Expr | int]:
        if not self._along or slices == 1:
            return super()._loops(slices)
        times = T.bind(T.if_then_else(self._once, T.int32(1), T.int32(slices)))
        return times, T.bind(T.if_then_else(self._once, T.int32(slices), T.int32(1)) * self._length)

    def _stored_bytes(self, piece: _Piece) -> tuple[dict[str, Expr], Expr]:
        unpacked = T.if_then_else(self._once, T.Cast("int64", piece.begin) * PANEL, T.int64(0))
        return {**self._env, "w": self._unpacked}, unpacked


class SlicedPairs(_Sliced):
    """bf16 by bf16, for a few more rows than a register tile has. The pairs of a slice are multiplied as they are
    stored."""

    kind = "f32"
    _DEEP = 128  # k of a slice: 16 KiB

    def __init__(
        self,
        by_pairs: ByPairs,
        isa: Isa,
        k: int,
        height: int,
        greatest: int,
        env: dict[str, Expr],
        prefetch: PrefetchOf,
    ) -> None:
        """`height`: rows of a register tile. Blocks have more rows than that, up to `greatest`."""
        super().__init__(env, k, self._DEEP, height, partial(by_pairs.width, isa), prefetch)
        self._pairs, self.row_bytes = by_pairs, 2 * k
        self._take_few(height + 1, greatest)

    def multiply(
        self, totals: Vectors, piece: _Piece, first: Expr, count: int, vectors: range, prefetch: Prefetch
    ) -> None:
        weights = T.bind(self._pairs.begins(self._k, piece.panel) + piece.begin * (PANEL // 2))
        row = T.bind(piece.row + first)
        self._pairs.multiply(
            self._env, totals, weights, self._k, row, piece.begin, count, vectors, piece.length, prefetch
        )


class SlicedFloats(_Sliced):
    """bf16 by bf16 in f32. Products are added in the order of k."""

    kind = "f32"
    _DEEP = 64  # k of a slice: 16 KiB of weights, 12 of rows

    def __init__(
        self,
        k: int,
        height: int,
        width: Callable[[int], int],
        env: dict[str, Expr],
        prefetch: PrefetchOf,
        few: SlicedPairs | None,
    ) -> None:
        """`few`: what computes blocks of few rows; None where all are computed here."""
        super().__init__(env, k, self._DEEP, height, width, prefetch)
        self._few, self.fewest = few, few.fewest if few else WIDEN_ROWS
        self.row_bytes = 2 * k
        self._weights = stack_array(self._DEEP * PANEL, "float32")
        # `wide` is used where it holds all rows of a block: they are widened already
        self._wide = env["wide"] if "wide" in env and WideRows.most(k) >= self.block_rows else None
        self._rows = stack_array(0 if self._wide else self._DEEP * self.block_rows, "float32")

    @property
    def most_rows(self) -> int:
        return WideRows.most(self._k) // self._height * self._height if self._wide else super().most_rows

    def take(self, top: Expr, here: Expr) -> None:
        if self._wide:
            self._wide.take(top, here)

    def emit(self, row: Expr, here: Expr, panel: Expr, place: tuple[Expr, Expr], sums: Expr) -> None:
        if self._few is None:
            super().emit(row, here, panel, place, sums)
            return
        with T.If(T.And(here >= self._few.fewest, here <= self._few.greatest)):
            with T.Then():
                if not self._wide:
                    self._env["wide"].take(row, here)
                self._few.emit(row, here, panel, place, sums)
            with T.Else():
                super().emit(row, here, panel, place, sums)

    def prepare_slice(self, piece: _Piece, here: Expr) -> None:
        panel, begin, length = piece.panel, piece.begin, piece.length
        pairs = T.bind(T.Cast("int64", panel) * (self._k * PANEL) + begin * PANEL)
        with T.serial(0, length // 2 * _VECTORS) as vector:
            both = T.bind(
                T.call_extern("int32x16", "xllm_load_i32", address(self._env["w"], pairs + vector * 2 * LANES))
            )
            even, odd = halves(both)
            pair, column = T.truncdiv(vector, T.int32(_VECTORS)), T.truncmod(vector, T.int32(_VECTORS))
            at = T.bind(pair * (2 * PANEL) + column * LANES)
            store(self._weights, at, even, "f32")
            store(self._weights, at + PANEL, odd, "f32")
        if self._wide:
            return
        with T.serial(0, here) as i:
            source = T.bind(T.Cast("int64", piece.row + i) * self._k + begin)
            for offset in range(0, length, LANES):
                part = load_part(self._env["x"], source + offset, min(LANES, length - offset), "bf16")
                store(self._rows, i * self._DEEP + offset, part, "f32")

    def multiply(
        self, totals: Vectors, piece: _Piece, first: Expr, count: int, vectors: range, prefetch: Prefetch
    ) -> None:
        wide = self._wide.of(piece.row + first, count) if self._wide else None

        def step(number: Expr) -> None:
            weights = [T.bind(load(self._weights, number * PANEL + vector * LANES, "f32")) for vector in vectors]
            for i in range(count):
                if wide:
                    operand = wide(i, piece.begin + number)
                else:
                    operand = T.bind(splat(self._rows[(first + i) * self._DEEP + number]))
                for j, weight in enumerate(weights):
                    index = i * len(weights) + j
                    totals[index] = fma(operand, weight, totals[index])

        in_blocks(piece.length, prefetch, step)
