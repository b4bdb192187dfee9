"""Attention of a query block over one KV block after the other, in register tiles: `Tiles`. From scores to weights it
uses softmax.py.

The rows of a query block (attend.py) are computed in tiles of up to 6, against KV blocks of 64 tokens that begin at
multiples of 64, in order. First all tiles of the query block are multiplied by a KV block's keys, then all by its
values. So each is read from memory once per query block, and then from the first-level cache. This is Dao et al.,
"FlashAttention-2", with one thread per query block.

For one row and one KV block (m, l, acc are the row's running maximum, sum of weights by lane, and weighted sum of
values):

    s = q.k * scale (capped); m' = max(m, s); a = exp(m - m'); p = exp(s - m'); l = l*a + p; acc = acc*a + p @ v

with p rounded to bf16 for bf16 values. A row sees token t of the cache if pos - window < t <= pos. The scores of other
tokens are masked, and their values are not read. So nothing in an unwritten slot or a later token can leak, not even
NaN. Pages that no row of a tile sees are not touched. Blocks and tiles do not change the order of one row's additions.

Pages are not contiguous, and the processor's own prefetcher starts anew in each. So the loops prefetch the next block,
which gives a decode step half as much bandwidth again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from tvm.tirx.script.builder import ir as T

from xllm_compiler.kernels.tir.attention.kv_address import Pages
from xllm_compiler.kernels.tir.attention.softmax import OnlySeen, Softmax
from xllm_compiler.kernels.tir.attention.state import BLOCK, BLOCK_PAGES, CHUNK, QUERY_ROWS, Item, State
from xllm_compiler.kernels.tir.codegen.builder import (
    Vectors,
    address,
    all_registers,
    choose,
    fma,
    load,
    splat,
    stack_array,
    store,
    tile_rows,
    tile_width,
)
from xllm_compiler.kernels.tir.codegen.kernel import TILE_TOKENS
from xllm_compiler.kernels.tir.isa.levels import LANES, Isa

if TYPE_CHECKING:
    from xllm_compiler.kernels.tir.attention.attend import Attend

Expr = Any
MAX_ROWS = 6
LINE = 64  # bytes of a cache line


@dataclass(frozen=True)
class Part:
    """One of the `of` loops over a block's keys, or over its values: number `number`. Each loop prefetches some pages
    of the next block. If one loop prefetched all of them, memory would be idle in the others."""

    number: int
    of: int

    @property
    def pages(self) -> range:
        """The pages of the next block that this loop prefetches."""
        return range(BLOCK_PAGES * self.number // self.of, BLOCK_PAGES * (self.number + 1) // self.of)


class Tiles(Softmax):
    """Emits the work on one KV block. `token` is a row of q, `row` a row of the current request and KV head, `place` a
    row of the query block."""

    def __init__(self, kernel: Attend, isa: Isa, env: dict[str, Expr]) -> None:
        self.kernel = kernel
        self.isa = isa
        self.env = env
        self.layout = kernel.kv
        self.group = kernel.q_heads // kernel.kv.heads
        self.pages = Pages(kernel.kv, env["table"], env["width"], env["stride"])
        self.value_vectors = -(-kernel.kv.v_dim // LANES)
        self.pairs = kernel.kv.dtype == "bf16"  # whether two elements are multiplied at a time
        self.key_steps = self.layout.k_steps  # of a loop over keys
        self.value_steps = BLOCK_PAGES * self.layout.v_steps  # of a loop over a block's values
        # the numbers of rows that a tile may have, up to those of the register tile with the most elements
        self.sizes = range(1, tile_rows(self.width, MAX_ROWS) + 1)

    def width(self, rows: int) -> int:
        """How many vectors wide a register tile of `rows` rows is: 4, 2 or 1; 0 where none fits."""
        return tile_width(self.isa, "bf16" if self.pairs else "f32", rows)

    def allocate(self) -> None:
        """Emits the arrays that the work on blocks needs."""
        self.scores = stack_array(MAX_ROWS * BLOCK, "float32")
        self.allocate_weights()
        self.allocate_state()

    def allocate_weights(self) -> None:
        """Emits the array of weights."""
        self.weights = stack_array(QUERY_ROWS * BLOCK, "uint16" if self.pairs else "float32")

    def allocate_state(self) -> None:
        """Emits the arrays that all kinds of tiles need."""
        self.state = State(self.value_vectors)
        self.tops = stack_array(QUERY_ROWS, "float32")  # each row's largest score of the current block
        self.values = stack_array(BLOCK_PAGES, "int64")  # addresses of the values of the block's pages
        self.next_keys = stack_array(BLOCK_PAGES, "int64")  # addresses of the keys of the next block's pages

    def allocate_beside(self, other: Tiles) -> None:
        """`allocate` for tiles that share the arrays of `other`, which computes a part of the work."""
        self.scores, self.state = other.scores, other.state
        self.values, self.next_keys = other.values, other.next_keys
        self.allocate_weights()

    def release(self) -> None:
        """Emits what must be done after the last block."""

    def fresh(self, item: Item, head: Expr, shift: Expr) -> None:
        """Emits the beginning of a chunk: the rows from `shift` on have seen nothing."""
        with T.serial(0, item.rows) as row:
            self.state.begin(shift + row)

    def block(self, item: Item, head: Expr, block: Expr, shift: Expr) -> None:
        """Emits the work on one KV block. It updates the state, from `shift` on, of all rows of the query block that
        see any of the KV block."""
        self.turn_to(item, head, block, shift)
        pages = self.find_pages(block)
        self.prepare_keys(pages)
        self._each_tile(lambda place, here: self.weigh_tile(place, here, pages))
        self.prepare_values()
        self._each_tile(self.add_tile)

    def turn_to(self, item: Item, head: Expr, block: Expr, shift: Expr) -> None:
        """Makes `block` the current block."""
        self.item, self.head, self.shift, self.base = item, head, shift, T.bind(block * BLOCK)
        # a member may begin with this block, and then nothing has prefetched its values
        self.begins = T.bind(T.Or(block == item.first_block, T.truncmod(block, T.int32(CHUNK // BLOCK)) == 0))

    def prepare_keys(self, pages: list[Expr]) -> None:
        """Emits what must be done before tiles are multiplied by the keys; nothing where keys are multiplied as they
        are stored."""

    def prepare_values(self) -> None:
        """The same for values."""

    def _each_tile(self, body: Callable[[Expr, Expr], None]) -> None:
        """Emits body(place of the first row, rows) for each tile that sees any of the block; tiles are equal parts."""
        rows, most = self.item.rows, self.sizes[-1]
        tiles = T.bind(T.truncdiv(rows + (most - 1), T.int32(most)))
        with T.serial(0, tiles) as tile:
            place = T.bind(T.truncdiv(rows * tile, tiles))
            here = T.bind(T.truncdiv(rows * (tile + 1), tiles) - place)
            # Rows are in the order of tokens: the first row's range begins first, the last row's ends last.
            lowest, _ = self.seen(place)
            _, highest = self.seen(place + here - 1)
            with T.If(T.And(lowest < self.base + BLOCK, highest > self.base)), T.Then():
                body(place, here)

    def prefetch_keys(self, step: Expr, steps: int, part: Part) -> None:
        """In step `step` of `steps` of a loop over keys, prefetches lines of the next block's keys, and of this block's
        values if nothing has prefetched them."""
        values = self.layout.v_steps * self.layout.v_row_bytes
        for page in part.pages:
            self._prefetch_lines(self.next_keys[page], self.layout.k_bytes, step, steps)
        with T.If(self.begins), T.Then():
            for page in part.pages:
                self._prefetch_lines(self.values[page], values, step, steps)

    def prefetch_values(self, step: Expr, steps: int, part: Part) -> None:
        """In step `step` of `steps` of a loop over the block's values, prefetches lines of the next block's values, and
        of the scales that follow them."""
        for page in part.pages:
            start = self.pages.values(self.next_keys[page])
            self._prefetch_lines(start, self.layout.head_bytes - self.layout.k_bytes, step, steps)

    def _prefetch_lines(self, start: Expr, size: int, step: Expr, steps: int) -> None:
        each, rest = divmod(-(-size // LINE), steps)
        for line in range(each):
            self.prefetch_line(start + (step * each + line) * LINE)
        if rest:
            with T.If(step < rest), T.Then():
                self.prefetch_line(start + (step + steps * each) * LINE)

    def _token(self, request: Expr, row: Expr) -> Expr:
        """The token (row of q) of a row of the request."""
        return self.env["start"][request] + T.truncdiv(row, T.int32(self.group))

    def sees(self, request: Expr, row: Expr) -> tuple[Expr, Expr]:
        """[first, last) of the cached tokens that a row sees."""
        position = T.bind(self.env["pos"][self._token(request, row)])
        first = T.bind(T.max(position - (self.kernel.window - 1), 0)) if self.kernel.window else T.int32(0)
        return first, T.bind(position + 1)

    def seen(self, place: Expr) -> tuple[Expr, Expr]:
        """`sees` for a row of the current query block."""
        return self.sees(self.item.request, self.item.first + place)

    def seen_here(self, place: Expr) -> tuple[Expr, Expr]:
        """[first, last) of the block's 64 tokens that a row sees. first >= last for a row that sees none."""
        begin, end = self.seen(place)
        return T.bind(T.max(begin - self.base, 0)), T.bind(T.min(end - self.base, BLOCK))

    def query(self, item: Item, place: Expr, *, head: Expr, width: int) -> Expr:
        """The offset of a row's elements in q (width k_dim) or out (width v_dim)."""
        row = item.first + place
        query_head = head * self.group + T.truncmod(row, T.int32(self.group))
        index = T.Cast("int64", self._token(item.request, row)) * self.kernel.q_heads + T.Cast("int64", query_head)
        return T.bind(index * width)

    def find_pages(self, block: Expr) -> list[Expr]:
        """The addresses of the keys of the current block's pages. Fills `values` and `next_keys`."""
        request, head = self.item.request, self.head
        lowest, _ = self.seen(T.int32(0))
        _, end = self.seen(self.item.rows - 1)
        start = T.bind(T.truncdiv(T.max(lowest - self.base, 0), T.int32(TILE_TOKENS)))
        stop = T.bind(T.truncdiv(T.min(end - self.base, BLOCK) - 1, T.int32(TILE_TOKENS)))
        # A page that no row sees may not exist. A page that exists takes its place, and its scores are masked.
        numbers = [T.max(T.min(T.int32(i), stop), start) for i in range(BLOCK_PAGES)]
        pages = [self.pages.page(request, block * BLOCK_PAGES + number, head) for number in numbers]
        last = T.bind(T.truncdiv(end - 1, T.int32(TILE_TOKENS)))
        # after the last block comes the next head's first
        over = T.bind(block * BLOCK_PAGES + BLOCK_PAGES > last)
        next_head = T.bind(T.Select(over, head + 1, head))
        next_block = T.bind(T.Select(over, self.item.first_block, block + 1))
        for i, page in enumerate(pages):
            T.buffer_store(self.values, self.pages.values(page), [i])
            after = T.min(next_block * BLOCK_PAGES + i, last)
            T.buffer_store(self.next_keys, self.pages.page(request, after, next_head), [i])
        return pages

    # ---- scores and values of one tile

    def weigh_tile(self, place: Expr, here: Expr, pages: list[Expr]) -> None:
        """Emits scores and weights of `here` rows from `place` on."""
        self.score_tile(place, here, pages)
        self.weigh_rows(place, here, T.int32(0))

    def score_tile(self, place: Expr, here: Expr, pages: list[Expr]) -> None:
        """Emits scores = q . k for `here` rows from `place` on."""
        choose(here, {count: partial(self.score, place, count, pages) for count in self.sizes})

    def add_tile(self, place: Expr, here: Expr) -> None:
        """Emits acc += p @ v for `here` rows from `place` on."""
        with T.If(self.all_see_all(place, here)):
            with T.Then():
                choose(here, {count: partial(self.add_values, place, count) for count in self.sizes})
            with T.Else(), T.serial(0, here) as i:
                one = T.bind(place + i)
                lo, hi = self.seen_here(one)
                with T.If(lo < hi), T.Then():
                    self._add_seen_values(one, lo, hi)

    def score(self, place: Expr, count: int, pages: list[Expr]) -> None:
        """Emits scores = q . k for `count` rows from `place` on."""
        queries = self.queries_at(place, count)
        width = self.width(count)
        for group in range(0, BLOCK_PAGES, width):
            with all_registers():
                part = Part(group // width, BLOCK_PAGES // width)
                totals = self._dots(queries, pages, range(group, group + width), part)
                for i in range(count):
                    for j in range(width):
                        store(self.scores, T.int32(i * BLOCK + (group + j) * LANES), totals[i * width + j], "f32")

    def _dots(self, queries: list[Expr], pages: list[Expr], group: range, part: Part) -> Vectors:
        """q . k for some rows by some of the pages."""
        totals = Vectors(len(queries) * len(group))
        for i in range(len(queries) * len(group)):
            totals[i] = splat(0.0)
        with T.serial(0, self.key_steps) as step:
            keys = [self.key(pages, number, step) for number in group]
            self.prefetch_keys(step, self.key_steps, part)
            for i, query in enumerate(queries):
                operand = self.query_element(query, step)
                for j, key in enumerate(keys):
                    totals[i * len(keys) + j] = self._multiply(totals[i * len(keys) + j], operand, key)
        return totals

    def add_values(self, place: Expr, count: int) -> None:
        """Emits acc += p @ v for `count` rows that see the whole block."""
        width = self.width(count)
        for vector in range(0, self.value_vectors, width):
            part = Part(vector // width, -(-self.value_vectors // width))
            with all_registers():
                self.add_to_vectors(place, count, range(vector, min(vector + width, self.value_vectors)), part)

    def add_to_vectors(self, place: Expr, count: int, vectors: range, part: Part) -> None:
        """`add_values` for the vectors `vectors` of the values' columns."""
        row = T.bind(self.shift + place)
        weights = T.bind(place * BLOCK)  # rows lie at constant distances, so that one address register serves all
        sums = Vectors(count * len(vectors))
        for i in range(count):
            for j, vector in enumerate(vectors):
                sums[i * len(vectors) + j] = load(self.state.totals, self.state.total(row + i, vector), "f32")
        # One loop over the block: LLVM would unroll one loop for each page, at every tile size.
        with T.serial(0, self.value_steps) as step:
            at = self.value_row(step)
            values = [self.value(at, vector) for vector in vectors]
            self.prefetch_values(step, self.value_steps, part)
            for i in range(count):
                operand = self.element(self.weights, weights + i * BLOCK, step)
                for j, value in enumerate(values):
                    sums[i * len(vectors) + j] = self._multiply(sums[i * len(vectors) + j], operand, value)
        for i in range(count):
            for j, vector in enumerate(vectors):
                store(self.state.totals, self.state.total(row + i, vector), sums[i * len(vectors) + j], "f32")

    def _add_seen_values(self, place: Expr, lo: Expr, hi: Expr) -> None:
        """Emits acc += p @ v for one row that sees tokens lo .. hi-1 of the block. Other values are not read."""
        row = T.bind(self.shift + place)
        sums = Vectors(self.value_vectors)
        for vector in range(self.value_vectors):
            sums[vector] = load(self.state.totals, self.state.total(row, vector), "f32")
        weights = T.bind(place * BLOCK)
        if self.pairs:
            with T.serial(T.truncdiv(lo, T.int32(2)), T.truncdiv(hi + 1, T.int32(2))) as pair:
                # the half of a pair that the row does not see may hold NaN
                first_seen = T.Select(pair * 2 >= lo, T.int32(0xFFFF), T.int32(0))
                second_seen = T.Select(pair * 2 + 1 < hi, T.int32(-0x10000), T.int32(0))
                mask = T.bind(T.broadcast(T.bitwise_or(first_seen, second_seen), LANES))
                operand = self.element(self.weights, weights, pair)
                at = self.value_row(pair)
                for vector in range(self.value_vectors):
                    value = T.bitwise_and(self.value(at, vector), mask)
                    sums[vector] = self._multiply(sums[vector], operand, value)
        else:
            with T.serial(lo, hi) as slot:
                operand = self.element(self.weights, weights, slot)
                at = self.value_row(slot)
                for vector in range(self.value_vectors):
                    sums[vector] = fma(operand, self.value(at, vector), sums[vector])
        for vector in range(self.value_vectors):
            store(self.state.totals, self.state.total(row, vector), sums[vector], "f32")

    def write_weights(self, at: Expr, place: Expr, weights: list[Expr], only_seen: OnlySeen) -> None:
        """Emits the store of a row's weights for `add_tile`."""
        for i, weight in enumerate(weights):
            store(self.weights, place * BLOCK + i * LANES, weight, self.layout.dtype)

    # ---- memory

    def queries_at(self, place: Expr, count: int) -> list[Expr]:
        """The indices at which `count` rows of q begin, for `query_element`."""
        return [self.query(self.item, place + i, head=self.head, width=self.layout.k_dim) for i in range(count)]

    def query_element(self, query: Expr, step: Expr) -> Expr:
        """What the keys are multiplied by in one step of a loop over them."""
        return self.element(self.env["q"], query, step)

    def key(self, pages: list[Expr], number: int, step: Expr) -> Expr:
        """One vector of K, of 16 tokens."""
        return self.words(pages[number] + step * self.layout.k_row_bytes)

    def words(self, offset: Expr) -> Expr:
        """One vector of the cache."""
        where = address(self.env["kv"], offset)
        if self.layout.element_bytes < 4:
            return T.bind(T.call_extern("int32x16", "xllm_load_i32", where))
        return T.bind(T.call_extern("float32x16", "xllm_load_f32", where))

    def prefetch_line(self, offset: Expr) -> None:
        T.evaluate(T.call_extern("int32", "xllm_prefetch", address(self.env["kv"], offset)))

    def value_row(self, step: Expr) -> Expr:
        """The address of row `step` of V in the block."""
        rows = self.layout.v_steps
        base = self.values[T.shift_right(step, T.int32(int(math.log2(rows))))]
        return T.bind(base + T.bitwise_and(step, T.int32(rows - 1)) * self.layout.v_row_bytes)

    def value(self, offset: Expr, vector: int) -> Expr:
        """One vector of V; lanes past v_dim are 0."""
        valid = min(self.layout.v_dim - vector * LANES, LANES)
        where = address(self.env["kv"], offset + vector * LANES * 4)
        kind, first = ("int32x16", "i32") if self.layout.element_bytes < 4 else ("float32x16", "f32")
        if valid == LANES:
            return T.bind(T.call_extern(kind, f"xllm_load_{first}", where))
        return T.bind(T.call_extern(kind, f"xllm_load_first_{first}", where, T.int32(valid)))

    def element(self, buffer: Expr, base: Expr, step: Expr) -> Expr:
        """One element or pair in all lanes."""
        if not self.pairs:
            return T.bind(splat(buffer[base + step]))
        return T.bind(T.broadcast(T.call_extern("int32", "xllm_load_pair", address(buffer, base + step * 2)), LANES))

    def _multiply(self, total: Expr, operand: Expr, vector: Expr) -> Expr:
        if self.pairs:
            return T.call_pure_extern("float32x16", "xllm_dot_bf16", total, operand, vector)
        return fma(operand, vector, total)
