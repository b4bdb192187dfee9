"""Attention over one KV block with Intel AMX: `AmxTiles`. Scratch memory and addresses are register_tiles.py's.

Rows are computed in AMX tiles of 16. The first operand of q @ k is 16 rows of q, which `fresh` lays out. The second is
a page of K, 32 elements at a time, as it is stored. Values lie in pairs of tokens, 8 rows to a page, and AMX takes as
long for 8 rows as for 16. So a block of V is copied once for all rows, two pages to a tile. acc is loaded into a tile,
p @ v is added, and it is stored. AMX computes each row alone, so one row has the same bits as sixteen.

A row may see less of a block than others do. Its p is 0 for the tokens that it does not see, and the copy has zeros for
what no row of the query block sees. But 0 times infinity or NaN is not 0, and a later token may hold these. So a block
that is seen in part is checked while it is copied. Where it has such values, each row gets a copy of its own, with
zeros for all that it does not see. A row that sees nothing of the block keeps its acc untouched, because AMX would
flush denormals to zero.

While a block is multiplied the next block's values are prefetched, and while it is copied the next block's keys. So
memory is never idle.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.tirx.script.builder import ir as T

from xllm_compiler.kernels.tir.attention.register_tiles import Tiles
from xllm_compiler.kernels.tir.attention.state import BLOCK, QUERY_ROWS, Item
from xllm_compiler.kernels.tir.codegen.amx import TILE_BYTES, TILE_ROWS, TileShapes, dot, load_tile, store_tile, zero
from xllm_compiler.kernels.tir.codegen.builder import Scalars, Vectors, address, load, stack_array, store
from xllm_compiler.kernels.tir.codegen.kernel import TILE_TOKENS
from xllm_compiler.kernels.tir.isa.levels import LANES

Expr = Any
_PAGES = BLOCK // TILE_TOKENS
_ELEMENTS = 32  # bf16 in a row of a tile
_TILE = TILE_ROWS * LANES  # 32-bit words in a tile
_LINE = 64
_NOT_FINITE = 0x7F800000  # f32's exponent, all ones; bf16's, shifted up
_SUMS = 4  # tile registers 0 to 3
_A, _B, _TAIL_A, _TAIL_B = 4, 6, 5, 7


class AmxTiles(Tiles):
    """`Tiles` for bf16 with AMX."""

    def allocate(self) -> None:
        self.allocate_state()
        k_dim = self.layout.k_dim
        self.full_steps, self.tail = k_dim // _ELEMENTS, k_dim % _ELEMENTS // 2
        self.all_steps = self.full_steps + (1 if self.tail else 0)
        self.scores = stack_array(QUERY_ROWS * BLOCK, "float32")
        self.weights = stack_array(QUERY_ROWS * BLOCK, "uint16")
        self.queries = stack_array(QUERY_ROWS // TILE_ROWS * self.all_steps * _TILE, "int32")
        self.copied = stack_array(2 * self.value_vectors * _TILE, "int32")  # [32 tokens, 16 columns] each
        self.part = stack_array(TILE_ROWS * self.value_vectors * LANES, "float32")
        self.shapes = TileShapes()

    def release(self) -> None:
        self.shapes.release()

    def fresh(self, item: Item, head: Expr, shift: Expr) -> None:
        """Lays out q, 16 rows by 32 elements at a time. The last 32 elements are filled up with zeros."""
        super().fresh(item, head, shift)
        rows = T.bind(T.min(item.rows, TILE_ROWS))
        shapes = [(rows, TILE_BYTES)] * 8
        shapes[_B] = (T.int32(TILE_ROWS), TILE_BYTES)
        if self.tail:
            shapes[_TAIL_A], shapes[_TAIL_B] = (rows, self.tail * 4), (T.int32(self.tail), TILE_BYTES)
        self.shapes.set(rows, shapes)
        with T.serial(0, item.rows) as row:
            query = self.query(item, row, head=head, width=self.layout.k_dim)
            tile = T.truncdiv(row, T.int32(TILE_ROWS)) * self.all_steps
            to = T.bind(tile * _TILE + T.truncmod(row, T.int32(TILE_ROWS)) * LANES)
            for step in range(self.all_steps):
                where = address(self.env["q"], query + step * _ELEMENTS)
                if step < self.full_steps:
                    words = T.call_extern("int32x16", "xllm_load_i32", where)
                else:
                    words = T.call_extern("int32x16", "xllm_load_first_i32", where, T.int32(self.tail))
                _put(self.queries, to + step * _TILE, words)

    def block(self, item: Item, head: Expr, block: Expr, shift: Expr) -> None:
        self.turn_to(item, head, block, shift)
        whole = T.bind(self.all_see_all(T.int32(0), item.rows))
        pages = self.find_pages(block)
        tiles = T.bind(T.truncdiv(item.rows + (TILE_ROWS - 1), T.int32(TILE_ROWS)))
        with T.serial(0, tiles) as tile:
            self._multiply_keys(tile, pages, T.And(tile == 0, self.begins))
        with T.If(whole):
            with T.Then():
                self._copy_values()
                self.weigh_rows(T.int32(0), item.rows, T.int32(0))
                with T.serial(0, tiles) as tile:
                    at = T.bind(shift + tile * TILE_ROWS)
                    self._multiply_values(tile, at, self.state.totals, self.state.total(at, 0))
            with T.Else():
                lo, hi = self.seen_here(T.int32(0))[0], self.seen_here(item.rows - 1)[1]
                odd = T.bind(self._copy_seen_values(lo, hi))
                with T.serial(0, tiles) as tile:
                    self._partly_seen(tile, odd)

    def _partly_seen(self, tile: Expr, odd: Expr) -> None:
        """The rows of one tile, some of which see nothing of the block, or not all of it."""
        first = T.bind(tile * TILE_ROWS)
        at = T.bind(self.shift + first)

        def each_row(body: Callable[[Expr, Expr, Expr], None]) -> None:
            with T.serial(first, T.min(self.item.rows, first + TILE_ROWS)) as row:
                lo, hi = self.seen_here(row)
                with T.If(lo < hi), T.Then():
                    body(row, lo, hi)

        def take(row: Expr) -> None:
            for vector in range(self.value_vectors):
                value = load(self.part, ((row - first) * self.value_vectors + vector) * LANES, "f32")
                store(self.state.totals, self.state.total(self.shift + row, vector), value, "f32")

        def alone(row: Expr, lo: Expr, hi: Expr) -> None:
            T.evaluate(self._copy_seen_values(lo, hi))
            self._multiply_values(tile, at, self.part, T.int32(0))
            take(row)

        self.weigh_rows(first, T.bind(T.min(self.item.rows - first, TILE_ROWS)), first)
        with T.If(odd == 0):
            with T.Then():
                self._multiply_values(tile, at, self.part, T.int32(0))
                each_row(lambda row, lo, hi: take(row))
            with T.Else():
                each_row(alone)

    # ---- products

    def _multiply_keys(self, tile: Expr, pages: list[Expr], first: Expr) -> None:
        """Emits scores = q . k for the rows of a tile; if `first`, it prefetches the block's values meanwhile."""
        lines = -(-TILE_TOKENS * self.layout.v_row_bytes // 2 // _LINE)
        each = -(-lines // self.all_steps)
        for i in range(_PAGES):
            zero(i)

        def step_of(step: Expr, a: int, b: int) -> None:
            with T.If(first), T.Then():
                for page in range(_PAGES):
                    for line in range(each):
                        self.prefetch_line(self.values[page] + (step * each + line) * _LINE)
            load_tile(a, address(self.queries, (tile * self.all_steps + step) * _TILE), TILE_BYTES)
            for i, page in enumerate(pages):
                load_tile(b, address(self.env["kv"], page + step * (TILE_ROWS * self.layout.k_row_bytes)), TILE_BYTES)
                dot("bf16", i, a, b)

        if self.full_steps:
            with T.serial(0, self.full_steps) as step:
                step_of(step, _A, _B)
        if self.tail:
            step_of(T.int32(self.full_steps), _TAIL_A, _TAIL_B)
        for i in range(_PAGES):
            store_tile(i, address(self.scores, tile * (TILE_ROWS * BLOCK) + i * LANES), BLOCK * 4)

    def _multiply_values(self, tile: Expr, row: Expr, to: Expr, at: Expr) -> None:
        """Emits to[at ..] = acc + p @ v for the rows of a tile. acc begins at `row` of the state."""
        stride = self.value_vectors * LANES * 4
        for start in range(0, self.value_vectors, _SUMS):
            vectors = range(start, min(start + _SUMS, self.value_vectors))
            for i, vector in enumerate(vectors):
                load_tile(i, address(self.state.totals, self.state.total(row, vector)), stride)
            for half in range(2):
                with T.If(tile == 0), T.Then():
                    self._prefetch_next_values(start // _SUMS * 2 + half)
                load_tile(_A, address(self.weights, tile * (TILE_ROWS * BLOCK) + half * _ELEMENTS), BLOCK * 2)
                for i, vector in enumerate(vectors):
                    load_tile(_B, address(self.copied, (half * self.value_vectors + vector) * _TILE), TILE_BYTES)
                    dot("bf16", i, _A, _B)
            for i, vector in enumerate(vectors):
                store_tile(i, address(to, at + vector * LANES), stride)

    def _prefetch_next_values(self, part: int) -> None:
        """Prefetches one part of the next block's values. There are two parts for every _SUMS vectors."""
        lines = -(-TILE_TOKENS * self.layout.v_dim * 2 // _LINE)
        each = -(-lines // (2 * -(-self.value_vectors // _SUMS)))
        for page in range(_PAGES):
            for line in range(part * each, min((part + 1) * each, lines)):
                self.prefetch_line(self.pages.values(self.next_keys[page]) + line * _LINE)

    def _each_pair(self, body: Callable[[Expr, Expr, Expr], None]) -> None:
        """Emits body(pair, address of the values of the pair of tokens, index of their copy) for all pairs of the
        block, and prefetches the keys of the next block meanwhile."""
        pairs = BLOCK // 2
        lines = -(-TILE_TOKENS * self.layout.k_dim * 2 // (_LINE * pairs))
        with T.serial(0, pairs) as pair:
            for page in range(_PAGES):
                for line in range(lines):
                    self.prefetch_line(self.next_keys[page] + (pair * lines + line) * _LINE)
            tile = T.shift_right(pair, T.int32(4)) * (self.value_vectors * _TILE)
            to = T.bind(tile + T.bitwise_and(pair, T.int32(TILE_ROWS - 1)) * LANES)
            body(pair, self.value_row(pair), to)

    def _copy_values(self) -> None:
        """Copies the values of the whole block."""

        def copy(pair: Expr, at: Expr, to: Expr) -> None:
            for vector in range(self.value_vectors):
                _put(self.copied, to + vector * _TILE, self.value(at, vector))

        self._each_pair(copy)

    def _copy_seen_values(self, lo: Expr, hi: Expr) -> Expr:
        """Copies the values of tokens lo .. hi-1 of the block, and zeros for the others. Returns 1 if a copied value is
        not finite, else 0."""
        worst = Vectors(1, "int32")
        worst[0] = T.broadcast(T.int32(0), LANES)

        def copy(pair: Expr, at: Expr, to: Expr) -> None:
            token = T.bind(pair * 2)
            first = T.Select(T.And(token >= lo, token < hi), T.int32(0xFFFF), T.int32(0))
            second = T.Select(T.And(token + 1 >= lo, token + 1 < hi), T.int32(-0x10000), T.int32(0))
            kept = T.bind(T.bitwise_or(first, second))
            with T.If(kept == 0):
                with T.Then():  # no token is seen, and their page may not exist
                    for vector in range(self.value_vectors):
                        _put(self.copied, to + vector * _TILE, T.broadcast(T.int32(0), LANES))
                with T.Else():
                    exponent = T.broadcast(T.int32(_NOT_FINITE), LANES)
                    for vector in range(self.value_vectors):
                        value = T.bind(T.bitwise_and(self.value(at, vector), T.broadcast(kept, LANES)))
                        _put(self.copied, to + vector * _TILE, value)
                        for half in (value, T.shift_left(value, T.broadcast(T.int32(16), LANES))):
                            worst[0] = T.max(worst[0], T.bitwise_and(half, exponent))

        self._each_pair(copy)
        lanes = stack_array(LANES, "int32")
        _put(lanes, T.int32(0), worst[0])
        found = Scalars(1, "int32")
        found[0] = T.int32(0)
        with T.serial(0, LANES) as lane, T.If(lanes[lane] == _NOT_FINITE), T.Then():
            found[0] = T.int32(1)
        return found[0]


def _put(buffer: Expr, index: Expr, words: Expr) -> None:
    T.evaluate(T.call_extern("int32", "xllm_store_i32", address(buffer, index), words))
