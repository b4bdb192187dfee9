"""The sums of a linear layer of 8-bit weights by vectors, a slice of a panel at a time: `SlicedRows`. Owns the slices.

Some machines multiply bytes faster than their second-level cache gives them. So a piece of the panel that the
first-level cache holds meets all of a block of rows before the next piece does, and what is summed up so far waits in
memory. Sums of integers are exact, so that no bit depends on it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tvm.tirx.script.builder import ir as T

from xllm_compiler.kernels.tir.base import LANES, PANEL, Isa
from xllm_compiler.kernels.tir.emit import Vectors, address, choose, load, store
from xllm_compiler.kernels.tir.linear_tiles import TileSums, byte_totals
from xllm_compiler.kernels.tir.weights import Ahead, Quantized

Expr = Any


class SlicedRows(TileSums):
    """Sums of stored integers, up to 32 rows by a panel."""

    def __init__(
        self,
        form: Quantized,
        isa: Isa,
        k: int,
        height: int,
        env: dict[str, Expr],
        ahead: Callable[[Expr, tuple[Expr, Expr], int, int], Ahead],
    ) -> None:
        """`height`: rows of a register tile. `ahead(panel, place, number, passes)`: as of _Loop."""
        self._form, self._isa, self._k, self._env, self._ahead = form, isa, k, env, ahead
        self._height, self.fewest = height, height + 1
        self.row_bytes = form.q.padded(k)
        self._length = min(isa.slice_bytes // PANEL, self.row_bytes)

    @staticmethod
    def can(form: Quantized, isa: Isa, k: int) -> bool:
        """Whether the panel is more than a slice: else it stays in the first-level cache by itself."""
        return form.q.bits == 8 and form.q.group == 0 and 0 < isa.slice_bytes < PANEL * form.q.padded(k)

    def emit(self, row: Expr, here: Expr, panel: Expr, place: tuple[Expr, Expr], sums: Expr) -> None:
        with T.serial(0, here * (PANEL // LANES)) as vector:
            zero = T.broadcast(T.int32(0), LANES)
            T.evaluate(T.call_extern("int32", "xllm_store_i32", address(sums, vector * LANES), zero))
        parts = T.bind(T.truncdiv(here + (self._height - 1), T.int32(self._height)))
        whole, rest = divmod(self.row_bytes, self._length)
        walks = whole + (rest > 0)
        tile, tiles = place

        def meet(number: Expr, length: int) -> None:
            with T.serial(0, parts) as part:
                first = T.bind(T.truncdiv(here * part, parts))
                count = T.bind(T.truncdiv(here * (part + 1), parts) - first)
                walk = T.bind((tile * walks + number) * parts + part), tiles * walks * parts
                add = partial(self._add, row, first, panel, walk, T.bind(number * self._length), length, sums)
                choose(count, {n: partial(add, n) for n in range(1, self._height + 1)})

        if whole:
            with T.serial(0, whole) as number:
                meet(number, self._length)
        if rest:
            meet(T.int32(whole), rest)
        q = self._form.q
        # by way of memory, as without slices: LLVM would fuse the product with a bias that is added to it
        with T.serial(0, here) as i:
            places = [T.bind(i * PANEL + vector) for vector in range(0, PANEL, LANES)]
            stored = [load(sums, at, "f32") for at in places]
            products = byte_totals(q, q.panel_bytes(self._k), self._env, row + i, panel, stored)
            for at, product in zip(places, products, strict=True):
                store(sums, at, product, "f32")

    def _add(
        self,
        row: Expr,
        first: Expr,
        panel: Expr,
        walk: tuple[Expr, Expr],
        begin: Expr,
        length: int,
        sums: Expr,
        count: int,
    ) -> None:
        """What `length` k from `begin` on add to the sums of `count` rows."""
        q = self._form.q
        width = self._form.width(self._isa, count)
        passes = PANEL // LANES // width
        start = T.Cast("int64", panel) * q.panel_bytes(self._k) + q.header_bytes
        weights = T.bind(start + T.Cast("int64", begin) * PANEL)
        x_at = T.bind(T.Cast("int64", row + first) * self.row_bytes + begin)
        for number in range(passes):
            vectors = range(number * width, (number + 1) * width)
            totals = Vectors(count * width, "int32")
            places = [address(sums, (first + i) * PANEL + vector * LANES) for i in range(count) for vector in vectors]
            for index, where in enumerate(places):
                totals[index] = T.call_extern("int32x16", "xllm_load_i32", where)
            ahead = self._ahead(panel, walk, number, passes)
            self._form.multiply(self._env, totals, weights, x_at, self._k, count, vectors, length, ahead)
            for index, where in enumerate(places):
                T.evaluate(T.call_extern("int32", "xllm_store_i32", where, totals[index]))

    def totals(self, row: Expr, panel: Expr, sums: list[Expr]) -> list[Expr]:
        return sums
