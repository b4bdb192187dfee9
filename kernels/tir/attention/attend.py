"""Attention over the KV pages: `Attend`. It shares the work out to members and merges their results.

A *row* is one query head of one token. The rows of a request that share a KV head are numbered token by token, head by
head. They are computed in query blocks of 48 rows, against *chunks* of 512 cached tokens that begin at multiples of 512
(register_tiles.py). Every chunk is a softmax of its own. Its maximum mc, its sums of weights lc by lane, and its
weighted sum of values accc are merged into the row's m, l and acc in the order of the chunks:

    m' = max(m, mc); a = exp(m - m'); b = exp(mc - m'); l = l*a + lc*b; acc = acc*a + accc*b

So any member may compute a chunk: a row's bits do not depend on the batch, on the tokens that it comes with, or on the
team. Members begin with equal parts of the work and steal pieces from each other (work_stealing.py).

A query block is usually one piece. It is divided, with a piece for each chunk, if it has few rows, many chunks, and is
a large part of a member's share, as when one long request is decoded. (Dao et al., "Flash-Decoding"; here the order of
adding is fixed.) Members write their results for its chunks to `parts`, memory of the step, and merge them after a
barrier. A query block for which `parts` has no room stays whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from xllm_compiler.kernels.tir.attention.amx import AmxTiles
from xllm_compiler.kernels.tir.attention.int8 import Int8Tiles
from xllm_compiler.kernels.tir.attention.kv_address import TABLE_SIZES, KvLayout
from xllm_compiler.kernels.tir.attention.register_tiles import Tiles
from xllm_compiler.kernels.tir.attention.state import BLOCK, CHUNK, QUERY_ROWS, Item
from xllm_compiler.kernels.tir.attention.widened import WideTiles
from xllm_compiler.kernels.tir.codegen.builder import (
    Scalars,
    build_function,
    fma,
    hold,
    horizontal_sum,
    load,
    splat,
    store,
    store_part,
)
from xllm_compiler.kernels.tir.codegen.kernel import MEMBER_ARGS, Arg, Kernel, require, scalar
from xllm_compiler.kernels.tir.codegen.vmath import exp_of_negative
from xllm_compiler.kernels.tir.codegen.work_stealing import WORK_QUEUES, steal_work
from xllm_compiler.kernels.tir.isa.levels import LANES, Isa

Expr = Any
_CHUNK_BLOCKS = CHUNK // BLOCK
_DIVIDED_ROWS = 16  # at most, of a divided query block: more rows are of a prompt, which has enough blocks to share out
_PIECES = 8  # of the work for each member
_WORTH_STEALING = 64  # rows times KV blocks of an average query block, from which on work stealing pays
_NOTABLE = 8  # a query block is divided if it costs more than a member's share divided by this


@dataclass(frozen=True)
class Attend(Kernel):
    """out[rows, q_heads, v_dim] = softmax(q . k * scale) @ v over what each token sees.

    `window` > 0: the last `window` tokens only. `softcap` > 0: scores become softcap * tanh(score / softcap).
    `sinks`: one more logit per query head that takes weight and has no value. `divide`: query blocks may be divided;
    then `parts` (f32 [room], any contents) holds the results of chunks, and `barrier` is the step's.
    """

    kv: KvLayout
    q_heads: int
    scale: float
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    divide: bool = False

    def __post_init__(self) -> None:
        require(self.q_heads % self.kv.heads == 0, f"{self.q_heads} query heads for {self.kv.heads} KV heads", self)
        require(math.isfinite(self.scale), f"scale {self.scale}", self)
        require(self.window >= 0 and self.softcap >= 0, f"window {self.window}, softcap {self.softcap}", self)

    @property
    def int8_dots(self) -> bool:
        return self.kv.quantized

    @property
    def args(self) -> tuple[Arg, ...]:
        dtype, heads = self.kv.dtype, self.q_heads
        pointers = (
            Arg("kv", "u8", "pages"),
            Arg("q", dtype, f"rows, {heads}, {self.kv.k_dim}"),
            Arg("pos", "i32", "rows"),
            Arg("seq", "i32", "rows"),
            Arg("start", "i32", "requests + 1"),
            Arg("table", "i32", "requests, width"),
        )
        sinks = (Arg("sinks", "f32", f"{heads}"),) if self.sinks else ()
        out = Arg("out", dtype, f"rows, {heads}, {self.kv.v_dim}", written=True)
        parts = (Arg("parts", "f32", "room", written=True), Arg("barrier", "u8", "64")) if self.divide else ()
        sizes = (scalar("rows"), scalar("requests"), *TABLE_SIZES, *((scalar("room"),) if self.divide else ()))
        return (*pointers, *sinks, out, *parts, WORK_QUEUES, *sizes, *MEMBER_ARGS)

    def build(self, isa: Isa) -> Any:
        return build_function(self, isa, lambda **env: _Body(self, isa, env).emit())


class _Body:
    """Emits the function's body."""

    def __init__(self, kernel: Attend, isa: Isa, env: dict[str, Expr]) -> None:
        self.kernel = kernel
        self.env = env
        if kernel.kv.quantized:
            self.tiles: Tiles = Int8Tiles(kernel, isa, env)
        elif kernel.kv.dtype == "bf16" and not isa.has_bf16_dot:
            self.tiles = WideTiles(kernel, isa, env)
        elif kernel.kv.dtype == "bf16" and isa.has_amx:
            self.tiles = AmxTiles(kernel, isa, env)
        else:
            self.tiles = Tiles(kernel, isa, env)
        self.vectors = self.tiles.value_vectors
        self.part = (2 + self.vectors) * LANES  # f32 of one row's part of one chunk: its maximum, sums and values

    # ---- sharing the work out

    def emit(self) -> None:
        """Members steal pieces, equal parts of the total cost. For each piece a loop over the query blocks of all heads
        finds those that belong to it.

        The cost of a query block is its rows times the KV blocks that they see, so that long contexts count fully.
        """
        self.tiles.allocate()
        self.state = self.tiles.state
        cost, largest, items = (Scalars(1, "int64") for _ in range(3))
        self.passed = Scalars(1, "int64")
        for counter in (cost, largest, items):
            counter[0] = T.int64(0)

        def count(item: Item, head: Expr) -> None:
            this = self._cost(item, item.first_block, item.last_block)
            cost[0] = cost[0] + this
            items[0] = items[0] + 1
            with T.If(item.rows <= _DIVIDED_ROWS), T.Then():
                largest[0] = T.max(largest[0], this)

        self._query_blocks(1, count)
        self.team = T.Cast("int64", self.env["team"])
        self.total = hold(T.max(cost[0], T.int64(1)) * self.kernel.kv.heads)
        # with short query blocks, looping past all of them for each piece costs more than waiting for a late member
        self.pieces = hold(self.team * T.Select(cost[0] >= items[0] * _WORTH_STEALING, T.int64(_PIECES), T.int64(1)))

        def piece(number: Expr, onward: Expr) -> None:
            self.piece = T.bind(T.Cast("int64", number))
            self._each_item(self._work)

        steal_work(T.Cast("int32", self.pieces), self.env["turns"], self.env["member"], self.env["team"], piece)
        self.tiles.release()
        if self.kernel.divide:
            with T.If(largest[0] * self.team * _NOTABLE > self.total), T.Then():
                T.evaluate(T.call_extern("int32", "xllm_team_barrier", self.env["barrier"].data, self.env["team"]))
                self._each_item(self._merge_parts)

    def _query_blocks(self, heads: int, body: Callable[[Item, Expr], None]) -> None:
        """Emits body(item, head) for all query blocks of the first `heads` KV heads. The query blocks of one request
        and head follow each other, so that the tokens they see are in the second-level cache."""
        start, group = self.env["start"], self.tiles.group
        with T.serial(0, self.env["requests"]) as request:
            begin = T.bind(start[request])
            rows = T.bind((start[request + 1] - begin) * group)
            blocks = T.bind(T.truncdiv(rows + (QUERY_ROWS - 1), T.int32(QUERY_ROWS)))
            with T.serial(0, heads) as head, T.serial(0, blocks) as block:
                first = T.bind(block * QUERY_ROWS)
                count = T.bind(T.min(rows - first, QUERY_ROWS))
                lowest, _ = self.tiles.sees(request, first)
                _, highest = self.tiles.sees(request, first + count - 1)
                first_block = T.bind(T.truncdiv(lowest, T.int32(BLOCK)))
                last_block = T.bind(T.truncdiv(highest - 1, T.int32(BLOCK)))
                body(Item(request, first, count, first_block, last_block), head)

    def _cost(self, item: Item, first_block: Expr, last_block: Expr) -> Expr:
        return T.bind(T.Cast("int64", (last_block - first_block + 1) * item.rows))

    def _each_item(self, body: Callable[[Item, Expr, Expr, Expr], None]) -> None:
        """Emits body(item, head, piece, at) for all query blocks of all KV heads. `piece`: the piece that the query
        block belongs to, or -1 where it is divided; then its parts begin at `at`."""
        used = Scalars(1, "int32")
        used[0] = T.int32(0)
        self.passed[0] = T.int64(0)

        def each(item: Item, head: Expr) -> None:
            cost = self._cost(item, item.first_block, item.last_block)
            chunks = T.bind(self._chunk(item.last_block) - self._chunk(item.first_block) + 1)
            needed = T.bind(chunks * item.rows * self.part)
            piece = Scalars(1, "int64")
            piece[0] = self._piece_of(self.passed[0], cost, self.pieces)
            at = T.bind(used[0])
            if self.kernel.divide:
                worth = T.And(item.rows <= _DIVIDED_ROWS, cost * self.team * _NOTABLE > self.total)
                begins = self._piece_of(self.passed[0], T.int64(0), self.team)
                apart = begins != self._piece_of(self.passed[0] + cost - 1, T.int64(0), self.team)
                fits = T.And(needed <= self.env["room"] - at, chunks > 1)
                with T.If(T.And(T.And(worth, fits), apart)), T.Then():
                    piece[0] = T.int64(-1)
                    used[0] = at + needed
            body(item, head, T.bind(piece[0]), at)
            self.passed[0] = self.passed[0] + cost

        self._query_blocks(self.kernel.kv.heads, each)

    def _piece_of(self, passed: Expr, cost: Expr, pieces: Expr) -> Expr:
        """Which of `pieces` equal parts of the total cost has the middle of `passed` .. `passed + cost`."""
        return hold(T.truncdiv((passed * 2 + cost) * pieces, self.total * 2))

    @staticmethod
    def _chunk(block: Expr) -> Expr:
        return T.truncdiv(block, T.int32(_CHUNK_BLOCKS))

    # ---- one query block

    def _work(self, item: Item, head: Expr, piece: Expr, at: Expr) -> None:
        """Computes what belongs to this piece: the whole item and its result, or some chunks of a divided item."""
        whole = T.bind(piece == self.piece)
        divided = T.bind(piece < T.int64(0))
        with T.If(T.Or(whole, divided)), T.Then():
            first_chunk = T.bind(self._chunk(item.first_block))
            at_chunk = Scalars(1, "int64")
            at_chunk[0] = self.passed[0]
            with T.serial(first_chunk, self._chunk(item.last_block) + 1) as chunk:
                first = T.bind(T.max(item.first_block, chunk * _CHUNK_BLOCKS))
                last = T.bind(T.min(item.last_block, chunk * _CHUNK_BLOCKS + (_CHUNK_BLOCKS - 1)))
                cost = self._cost(item, first, last)
                mine = T.Or(whole, self._piece_of(at_chunk[0], cost, self.pieces) == self.piece)
                at_chunk[0] = at_chunk[0] + cost
                # The first chunk is computed in place: merging it into an empty state would change no bit.
                shift = T.bind(T.Select(T.And(whole, chunk == first_chunk), T.int32(0), T.int32(QUERY_ROWS)))
                with T.If(mine), T.Then():
                    self.tiles.fresh(item, head, shift)
                    with T.serial(first, last + 1) as block:
                        self.tiles.block(item, head, block, shift)
                    with T.If(T.And(whole, shift > 0)), T.Then(), T.serial(0, item.rows) as row:
                        self._merge_seen(item, row, chunk, self.state.reader(QUERY_ROWS + row))
                    if self.kernel.divide:
                        with T.If(divided), T.Then(), T.serial(0, item.rows) as row:
                            self._keep(QUERY_ROWS + row, self._part(at, item, chunk - first_chunk, row))
            with T.If(whole), T.Then(), T.serial(0, item.rows) as row:
                self._finish(item, row, head)

    def _merge_parts(self, item: Item, head: Expr, piece: Expr, at: Expr) -> None:
        """Merges the parts of a divided item's rows. Members compute different rows."""
        first_chunk = T.bind(self._chunk(item.first_block))
        with T.If(piece < T.int64(0)), T.Then(), T.serial(0, item.rows) as row:
            turn = T.truncmod(head * item.rows + row, self.env["team"])
            with T.If(turn == self.env["member"]), T.Then():
                self.state.begin(row)
                with T.serial(first_chunk, self._chunk(item.last_block) + 1) as chunk:
                    part = self._part(at, item, chunk - first_chunk, row)
                    parts = self.env["parts"]
                    self._merge_seen(
                        item,
                        row,
                        chunk,
                        (lambda: parts[part], lambda i: load(parts, part + (1 + i) * LANES, "f32")),
                    )
                self._finish(item, row, head)

    def _part(self, at: Expr, item: Item, chunk: Expr, row: Expr) -> Expr:
        return T.bind(at + (chunk * item.rows + row) * self.part)

    def _keep(self, row: Expr, part: Expr) -> None:
        """Writes a row's state of one chunk to `parts`."""
        parts = self.env["parts"]
        top, rest = self.state.reader(row)
        T.buffer_store(parts, top(), [part])
        for i in range(1 + self.vectors):
            store(parts, part + (1 + i) * LANES, rest(i), "f32")

    def _merge_seen(
        self, item: Item, row: Expr, chunk: Expr, part: tuple[Callable[[], Expr], Callable[[int], Expr]]
    ) -> None:
        """Merges a chunk into the row's state, if the row sees any of it."""
        begin, end = self.tiles.sees(item.request, item.first + row)
        with T.If(T.And(begin < (chunk + 1) * CHUNK, end > chunk * CHUNK)), T.Then():
            top, rest = part
            mine, other = T.bind(self.state.maxima[row]), T.bind(top())
            highest = T.bind(T.Select(mine < other, other, mine))
            T.buffer_store(self.state.maxima, highest, [row])
            lower = T.bind(splat(0.0) - splat(highest))
            a = T.bind(exp_of_negative(splat(mine) + lower))
            b = T.bind(exp_of_negative(splat(other) + lower))
            for i in range(1 + self.vectors):
                buffer, place = self.state.place(row, i)
                added = T.bind(rest(i) * b)
                store(buffer, place, fma(load(buffer, place, "f32"), a, added), "f32")

    def _finish(self, item: Item, row: Expr, head: Expr) -> None:
        """Writes out = acc / l. l includes the sink."""
        buffer, place = self.state.place(row, 0)
        total = T.bind(horizontal_sum(load(buffer, place, "f32")))
        if self.kernel.sinks:
            query_head = head * self.tiles.group + T.truncmod(item.first + row, T.int32(self.tiles.group))
            sink, top = T.bind(self.env["sinks"][query_head]), T.bind(self.state.maxima[row])
            lower = T.bind(splat(0.0) - splat(T.max(sink, top)))
            a = T.bind(exp_of_negative(splat(top) + lower))
            rest = T.bind(exp_of_negative(splat(sink) + lower))
            inverse = T.bind(a / fma(splat(total), a, rest))
        else:
            inverse = T.bind(splat(T.float32(1.0) / total))
        layout = self.kernel.kv
        to = self.tiles.query(item, row, head=head, width=layout.v_dim)
        for vector in range(self.vectors):
            valid = min(layout.v_dim - vector * LANES, LANES)
            buffer, place = self.state.place(row, 1 + vector)
            value = load(buffer, place, "f32") * inverse
            store_part(self.env["out"], to + vector * LANES, value, valid, layout.dtype)
