"""Attention over one KV block in bf16, where no instruction multiplies bf16: `WideTiles`. The rest is
register_tiles.py's.

q, a block's keys and its values are widened to f32 once for all rows of the query block, and not for every product.
Weights are rounded to bf16 all the same. Products are added in the order of the elements, which is that of `Tiles` too.

`Tiles` computes query blocks of few rows. There memory takes most of the time, and widening would delay it.
"""

from __future__ import annotations

from typing import Any

from tvm.tirx.script.builder import ir as T

from xllm_compiler.kernels.tir.attention.register_tiles import MAX_ROWS, Part, Tiles
from xllm_compiler.kernels.tir.attention.softmax import OnlySeen
from xllm_compiler.kernels.tir.attention.state import BLOCK, BLOCK_PAGES, QUERY_ROWS, Item
from xllm_compiler.kernels.tir.codegen.builder import halves, load, load_part, stack_array, store, tile_rows, tile_sizes
from xllm_compiler.kernels.tir.isa.levels import LANES
from xllm_compiler.kernels.tir.rows.norms import each_vector

Expr = Any
_WHOLE = Part(0, 1)


class WideTiles(Tiles):
    """`Tiles` for bf16 by f32 arithmetic."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.pairs = False
        self.key_steps, self.value_steps = self.layout.k_dim, BLOCK
        self.query_width = -(-self.layout.k_dim // LANES) * LANES
        self.narrow = Tiles(*args)
        self.few = self.narrow.sizes[-1]  # rows, at most, of a query block that `narrow` computes: one tile
        most = tile_rows(self.width, MAX_ROWS)
        self.sizes = tile_sizes(range(self.few + 1, QUERY_ROWS + 1), most)

    def allocate(self) -> None:
        super().allocate()
        self.narrow.allocate_beside(self)
        self.queries = stack_array(QUERY_ROWS * self.query_width, "float32")
        self.wide_keys = stack_array(self.layout.k_dim * BLOCK, "float32")
        self.wide_values = stack_array(BLOCK * self.value_vectors * LANES, "float32")

    def turn_to(self, item: Item, head: Expr, block: Expr, shift: Expr) -> None:
        super().turn_to(item, head, block, shift)
        self.narrow.turn_to(item, head, block, shift)

    def _is_wide(self, item: Item) -> Expr:
        return item.rows > self.few

    def fresh(self, item: Item, head: Expr, shift: Expr) -> None:
        super().fresh(item, head, shift)
        with T.If(self._is_wide(item)), T.Then(), T.serial(0, item.rows) as row:
            source = self.query(item, row, head=head, width=self.layout.k_dim)
            to = T.bind(row * self.query_width)

            def part(at: Expr, valid: int, source: Expr = source, to: Expr = to) -> None:
                store(self.queries, to + at, load_part(self.env["q"], source + at, valid, "bf16"), "f32")

            each_vector(self.layout.k_dim, part)

    def prepare_keys(self, pages: list[Expr]) -> None:
        steps = self.layout.k_steps
        with T.If(self._is_wide(self.item)), T.Then(), T.serial(0, steps) as step:
            super().prefetch_keys(step, steps, _WHOLE)
            for number, page in enumerate(pages):
                even, odd = halves(self.words(page + step * self.layout.k_row_bytes))
                at = T.bind(step * (2 * BLOCK) + number * LANES)
                store(self.wide_keys, at, even, "f32")
                store(self.wide_keys, at + BLOCK, odd, "f32")

    def prepare_values(self) -> None:
        width = self.value_vectors * LANES
        steps = BLOCK_PAGES * self.layout.v_steps
        with T.If(self._is_wide(self.item)), T.Then(), T.serial(0, steps) as pair:
            super().prefetch_values(pair, steps, _WHOLE)
            row = super().value_row(pair)
            for vector in range(self.value_vectors):
                even, odd = halves(super().value(row, vector))
                at = T.bind(pair * (2 * width) + vector * LANES)
                store(self.wide_values, at, even, "f32")
                store(self.wide_values, at + width, odd, "f32")

    def prefetch_keys(self, step: Expr, steps: int, part: Part) -> None:
        """Does nothing: `prepare_keys` has prefetched them, once for all tiles."""

    def prefetch_values(self, step: Expr, steps: int, part: Part) -> None:
        """Does nothing: `prepare_values` has prefetched them."""

    def score_tile(self, place: Expr, here: Expr, pages: list[Expr]) -> None:
        with T.If(self._is_wide(self.item)):
            with T.Then():
                super().score_tile(place, here, pages)
            with T.Else():
                self.narrow.score_tile(place, here, pages)

    def add_tile(self, place: Expr, here: Expr) -> None:
        with T.If(self._is_wide(self.item)):
            with T.Then():
                super().add_tile(place, here)
            with T.Else():
                self.narrow.add_tile(place, here)

    def write_weights(self, at: Expr, place: Expr, weights: list[Expr], only_seen: OnlySeen) -> None:
        self.narrow.write_weights(at, place, weights, only_seen)
        for token in range(0, BLOCK, LANES):
            rounded = load(self.narrow.weights, place * BLOCK + token, "bf16")
            store(self.weights, place * BLOCK + token, rounded, "f32")

    def queries_at(self, place: Expr, count: int) -> list[Expr]:
        first = T.bind(place * self.query_width)
        return [first + i * self.query_width for i in range(count)]

    def query_element(self, query: Expr, step: Expr) -> Expr:
        return self.element(self.queries, query, step)

    def key(self, pages: list[Expr], number: int, step: Expr) -> Expr:
        return T.bind(load(self.wide_keys, step * BLOCK + number * LANES, "f32"))

    def value_row(self, step: Expr) -> Expr:
        return T.bind(step * (self.value_vectors * LANES))

    def value(self, offset: Expr, vector: int) -> Expr:
        return T.bind(load(self.wide_values, offset + vector * LANES, "f32"))
