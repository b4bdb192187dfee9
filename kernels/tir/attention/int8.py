"""Attention over one KV block of an 8-bit cache, in integers: `Int8Tiles`. The rest is in register_tiles.py.

Keys and values are multiplied as they are stored, four at a time, by the dot product of 8-bit integers. So q and p are
rounded to 8 bits too, as in Zhang et al., "SageAttention":

    q       round(q / max |q| * 127) by row, plus 128, since one operand of the instruction is unsigned. The cache has
            the sum of each key's integers, with which the 128 is taken off again
    p       round(p * scale of the value / their maximum * 255) by row and block; never negative

Sums of products are exact, so a row's bits do not depend on the other rows of its tile.

A row that does not see a token has p = 0 for it, and 0 times any integer is 0. So no value can leak. A value's scale
could, if it were NaN; so the scale of an unseen value is never used.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tvm.tirx.script.builder import ir as T

from xllm_compiler.kernels.tir.attention.register_tiles import MAX_ROWS, Part, Tiles
from xllm_compiler.kernels.tir.attention.softmax import OnlySeen, PartOfWeighing, Seen
from xllm_compiler.kernels.tir.attention.state import BLOCK, BLOCK_PAGES, QUERY_ROWS, Item
from xllm_compiler.kernels.tir.codegen.builder import (
    Vectors,
    address,
    all_registers,
    choose,
    fma,
    load,
    load_part,
    splat,
    stack_array,
    store,
)
from xllm_compiler.kernels.tir.isa.levels import LANES
from xllm_compiler.kernels.tir.rows.norms import each_vector
from xllm_compiler.kernels.tir.rows.quantize import inverse_scale, largest_size, rounded, store_integers
from xllm_compiler.weight_formats import LARGEST

Expr = Any
_QUAD = 4
_TOP = 255.0
_LEAST = 1e-30  # if all weights of a row are below this they become 0; 255 / _LEAST is finite


class Int8Tiles(Tiles):
    """`Tiles` for a quantized cache of either type."""

    def allocate(self) -> None:
        self.allocate_state()
        self.queries = stack_array(QUERY_ROWS * self.layout.k_steps * _QUAD + LANES, "uint8")
        self.q_scales = stack_array(QUERY_ROWS, "float32")
        self.sums = stack_array(MAX_ROWS * BLOCK, "int32")
        self.scores = stack_array(MAX_ROWS * BLOCK, "float32")
        self.rounded_weights = stack_array(QUERY_ROWS * BLOCK, "uint8")
        self.p_scales = stack_array(QUERY_ROWS, "float32")
        self.key_scales = stack_array(BLOCK_PAGES, "int64")  # where they are, of the block's pages
        self.value_scales = stack_array(BLOCK_PAGES, "int64")

    def width(self, rows: int) -> int:
        each = LANES // self.isa.register_lanes
        held = 1 if self.isa.has_int8_dot else 3
        for width in (4, 2, 1):
            if each * (rows * width + held * width + 1) <= self.isa.vector_registers:
                return width
        return 0

    def fresh(self, item: Item, head: Expr, shift: Expr) -> None:
        """Begins a chunk, and rounds q."""
        super().fresh(item, head, shift)
        dim, dtype, q = self.layout.k_dim, self.layout.dtype, self.env["q"]
        with T.serial(0, item.rows) as row:
            base = self.query(item, row, head=head, width=dim)
            largest = largest_size(q, base, dim, dtype)
            T.buffer_store(self.q_scales, largest * T.float32(1 / LARGEST), [row])
            factor = inverse_scale(largest)
            to = T.bind(row * (self.layout.k_steps * _QUAD))

            def part(at: Expr, valid: int, base: Expr = base, factor: Expr = factor, to: Expr = to) -> None:
                value = rounded(load_part(q, base + at, valid, dtype) * splat(factor))
                store_integers(self.queries, to + at, value + T.broadcast(T.int32(128), LANES))

            each_vector(dim, part)

    def prepare_keys(self, pages: list[Expr]) -> None:
        for i, page in enumerate(pages):
            T.buffer_store(self.key_scales, self.pages.key_scales(page), [i])
            T.buffer_store(self.value_scales, self.pages.value_scales(page), [i])

    def add_tile(self, place: Expr, here: Expr) -> None:
        choose(here, {count: partial(self.add_values, place, count) for count in self.sizes})

    # ---- scores

    def score(self, place: Expr, count: int, pages: list[Expr]) -> None:
        """Emits sums = q . k in integers."""
        width = self.width(count)
        for group in range(0, BLOCK_PAGES, width):
            some = pages[group : group + width]
            with all_registers():
                sums = Vectors(count * width, "int32")
                for j, page in enumerate(some):
                    taken_off = self.words(self.pages.key_sums(page))
                    for i in range(count):
                        sums[i * width + j] = T.broadcast(T.int32(-128), LANES) * taken_off

                def keys(step: Expr, some: list[Expr] = some) -> list[Expr]:
                    return [self.words(page + step * self.layout.k_row_bytes) for page in some]

                first = T.bind(place * (self.layout.k_steps * _QUAD))
                starts = [first + i * (self.layout.k_steps * _QUAD) for i in range(count)]
                part = Part(group // width, BLOCK_PAGES // width)
                self._multiply_bytes(self.queries, starts, self.key_steps, keys, self.prefetch_keys, part, sums)
                for i in range(count):
                    for j in range(width):
                        where = address(self.sums, i * BLOCK + (group + j) * LANES)
                        T.evaluate(T.call_extern("int32", "xllm_store_i32", where, sums[i * width + j]))

    def read_scores(self, at: Expr, place: Expr) -> list[Expr]:
        scale = T.bind(splat(self.q_scales[place]))
        scores = []
        for i in range(BLOCK_PAGES):
            where = address(self.sums, at * BLOCK + i * LANES)
            sums = T.Cast("float32x16", T.call_extern("int32x16", "xllm_load_i32", where))
            of_keys = T.call_extern("float32x16", "xllm_load_f32", address(self.env["kv"], self.key_scales[i]))
            scores.append(T.bind(sums * of_keys * scale))
            store(self.scores, at * BLOCK + i * LANES, scores[i], "f32")
        return scores

    # ---- values

    def parts_of_weighing(self) -> list[PartOfWeighing]:
        return [*super().parts_of_weighing(), self.round_weights]

    def write_weights(self, at: Expr, place: Expr, weights: list[Expr], only_seen: OnlySeen) -> None:
        """Emits scores = weights times the values' scales, and tops = the largest of them."""
        sizes = []
        for i, weight in enumerate(weights):
            scale = T.call_extern("float32x16", "xllm_load_f32", address(self.env["kv"], self.value_scales[i]))
            scaled = T.bind(only_seen(i, weight * scale, 0.0))  # an unseen value's scale may be NaN
            store(self.scores, at * BLOCK + i * LANES, scaled, "f32")
            bits = T.reinterpret("int32x16", scaled)
            sizes.append(T.bind(T.bitwise_and(bits, T.broadcast(T.int32(0x7FFFFFFF), LANES))))
        top = T.max(T.max(sizes[0], sizes[1]), T.max(sizes[2], sizes[3]))
        T.buffer_store(self.tops, T.call_pure_extern("float32", "xllm_largest_size", top), [place])

    def round_weights(self, at: Expr, place: Expr, seen: Seen) -> None:
        """Rounds what `write_weights` left to the integers that the values are multiplied by."""
        largest = T.bind(self.tops[place])
        T.buffer_store(self.p_scales, largest * T.float32(1 / _TOP), [place])
        factor = T.bind(T.Select(largest > T.float32(_LEAST), T.float32(_TOP) / largest, T.float32(0)))
        for i in range(BLOCK_PAGES):
            scaled = load(self.scores, at * BLOCK + i * LANES, "f32")
            store_integers(self.rounded_weights, T.bind(place * BLOCK + i * LANES), rounded(scaled * splat(factor)))

    def add_to_vectors(self, place: Expr, count: int, vectors: range, part: Part) -> None:
        width = len(vectors)
        sums = Vectors(count * width, "int32")
        for i in range(count * width):
            sums[i] = T.broadcast(T.int32(0), LANES)

        def values(step: Expr) -> list[Expr]:
            at = self.value_row(step)
            return [self.value(at, vector) for vector in vectors]

        first = T.bind(place * BLOCK)
        starts = [first + i * BLOCK for i in range(count)]
        self._multiply_bytes(self.rounded_weights, starts, self.value_steps, values, self.prefetch_values, part, sums)
        for i in range(count):
            scale = T.bind(splat(self.p_scales[place + i]))
            lo, hi = self.seen_here(place + i)
            sees = T.bind(lo < hi)
            for j, vector in enumerate(vectors):
                at = T.bind(self.state.total(self.shift + place + i, vector))
                before = T.bind(load(self.state.totals, at, "f32"))
                after = fma(T.Cast("float32x16", sums[i * width + j]), scale, before)
                # a row that sees nothing keeps its state: adding 0 would turn -0 into 0
                store(self.state.totals, at, T.Select(sees, after, before), "f32")

    # ---- both

    @staticmethod
    def _multiply_bytes(
        left: Expr,
        starts: list[Expr],
        steps: int,
        vectors: Callable[[Expr], list[Expr]],
        prefetch: Callable[[Expr, int, Part], None],
        part: Part,
        sums: Vectors,
    ) -> None:
        """Emits sums += left . vectors. Row i's bytes begin at starts[i]."""
        with T.serial(0, steps) as step:
            right = vectors(step)
            prefetch(step, steps, part)
            for i, start in enumerate(starts):
                four = T.call_extern("int32", "xllm_load_pair", address(left, start + step * _QUAD))
                operand = T.bind(T.broadcast(four, LANES))
                for j, vector in enumerate(right):
                    index = i * len(right) + j
                    sums[index] = T.call_pure_extern("int32x16", "xllm_dot_u8i8", sums[index], operand, vector)
