"""Attention over the KV pages: `Attend`. Owns the online softmax, its tiles and how the work is shared out.

A *row* is one query head of one token; the rows of a request that share a KV head are numbered token by token, head by
head. They are worked on in query blocks of 48 rows, within those in tiles of up to 6, and against KV blocks of 64
tokens that begin at multiples of 64, in order. For each KV block every tile of the query block takes its turn, so a
block of K and V is read from memory once per query block. This is Dao et al., "FlashAttention-2", with one thread per
query block.

For one row and one KV block (m, l, acc are the row's running maximum, sum of weights by lane, and weighted sum of
values):

    s = q.k * scale (capped); m' = max(m, s); a = exp(m - m'); p = exp(s - m'); l = l*a + p; acc = acc*a + p @ v

with p rounded to bf16 for bf16 values. A row sees token t of the cache if pos - window < t <= pos. Scores of what a row
does not see are masked, and values that it does not see are not looked at, so nothing that an unwritten slot or a later
token holds can leak, not even NaN; pages that no row of a tile sees are not touched. Blocks and tiles change nothing
about how one row's numbers are added, so its bits do not depend on the batch, the chunk or the team.

Pages lie anywhere, and the processor's own prefetcher starts anew in each, so the loops ask ahead for what comes next:
half again the bandwidth of a decode step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from tvm.tirx.script.builder import ir as T

from xllm_compiler.kernels.tir.base import LANES, MEMBER_ARGS, PAGE, Arg, Isa, Kernel, require, scalar
from xllm_compiler.kernels.tir.emit import (
    Scalars,
    Vectors,
    address,
    build_function,
    choose,
    fma,
    horizontal_max,
    horizontal_sum,
    keep_between,
    load,
    splat,
    store,
    store_part,
    tile_rows,
    tile_width,
)
from xllm_compiler.kernels.tir.kv_address import KvLayout, Pages
from xllm_compiler.kernels.tir.vmath import exp_of_negative, maximum, tanh

Expr = Any
_BLOCK = 64
_BLOCK_PAGES = _BLOCK // PAGE
_QUERY_ROWS = 48
_MAX_ROWS = 6
_LINE = 64  # bytes of a cache line


@dataclass(frozen=True)
class Attend(Kernel):
    """out[rows, q_heads, v_dim] = softmax(q . k * scale) @ v over what each token sees.

    `window` > 0: the last `window` tokens only. `softcap` > 0: scores become softcap * tanh(score / softcap).
    `sinks`: one more logit per query head that takes weight and has no value.
    """

    kv: KvLayout
    q_heads: int
    scale: float
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False

    def __post_init__(self) -> None:
        require(self.q_heads % self.kv.heads == 0, f"{self.q_heads} query heads for {self.kv.heads} KV heads", self)
        require(math.isfinite(self.scale), f"scale {self.scale}", self)
        require(self.window >= 0 and self.softcap >= 0, f"window {self.window}, softcap {self.softcap}", self)

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
        return (*pointers, *sinks, out, scalar("rows"), scalar("requests"), scalar("width"), *MEMBER_ARGS)

    def build(self, isa: Isa) -> Any:
        return build_function(self, isa, lambda **env: _Body(self, isa, env).emit())


class _Body:
    """Emits the function's body. Names: `token` is a row of q, `row` a row of the request and KV head at hand."""

    def __init__(self, kernel: Attend, isa: Isa, env: dict[str, Expr]) -> None:
        self.kernel = kernel
        self.isa = isa
        self.env = env
        self.layout = kernel.kv
        self.bf16 = kernel.kv.dtype == "bf16"
        self.group = kernel.q_heads // kernel.kv.heads
        self.pages = Pages(kernel.kv, env["table"], env["width"])
        self.value_vectors = -(-kernel.kv.v_dim // LANES)
        self.height = tile_rows(partial(tile_width, isa, kernel.kv.dtype), _MAX_ROWS)
        self.steps = kernel.kv.k_dim // 2 if self.bf16 else kernel.kv.k_dim

    # ---- sharing out

    def emit(self) -> None:
        """Walks the query blocks in order and works on those whose share of the total cost falls to this member.

        The cost of a block is its rows times the KV blocks they see, so that long contexts weigh what they take.
        """
        member, team = (T.Cast("int64", self.env[name]) for name in ("member", "team"))
        scores = self._local(_MAX_ROWS * _BLOCK, "float32")
        weights = self._local(_MAX_ROWS * _BLOCK, "uint16" if self.bf16 else "float32")
        sums = self._local(_QUERY_ROWS * LANES, "float32")
        maxima = self._local(_QUERY_ROWS, "float32")
        totals = self._local(_QUERY_ROWS * self.value_vectors * LANES, "float32")
        self.scores, self.weights, self.sums, self.maxima, self.totals = scores, weights, sums, maxima, totals
        self.values = self._local(_BLOCK_PAGES, "int64")  # where the values of the block's pages begin
        self.next_keys = self._local(_BLOCK_PAGES, "int64")  # and the keys of the next block's

        cost = Scalars(2, "int64")
        cost[0] = T.int64(0)

        def count(request: Expr, first: Expr, rows: Expr, cost_each: Expr) -> None:
            cost[0] = cost[0] + cost_each * self.layout.heads

        self._query_blocks(count)
        total = T.bind(T.max(cost[0], T.int64(1)))
        cost[1] = T.int64(0)

        def work(request: Expr, first: Expr, rows: Expr, cost_each: Expr) -> None:
            with T.serial(0, self.layout.heads) as head:
                owner = T.bind(T.truncdiv((cost[1] * 2 + cost_each) * team, total * 2))
                cost[1] = cost[1] + cost_each
                with T.If(owner == member), T.Then():
                    self._work(request, first, rows, head)

        self._query_blocks(work)

    def _query_blocks(self, body: Callable[[Expr, Expr, Expr, Expr], None]) -> None:
        """Emits body(request, first row, rows, cost) for all query blocks of one KV head."""
        start, pos = self.env["start"], self.env["pos"]
        with T.serial(0, self.env["requests"]) as request:
            begin = T.bind(start[request])
            rows = T.bind((start[request + 1] - begin) * self.group)
            blocks = T.truncdiv(rows + (_QUERY_ROWS - 1), T.int32(_QUERY_ROWS))
            with T.serial(0, blocks) as block:
                first = T.bind(block * _QUERY_ROWS)
                count = T.bind(T.min(rows - first, _QUERY_ROWS))
                position = pos[begin + T.truncdiv(first + count - 1, T.int32(self.group))]
                seen = position if self.kernel.window == 0 else T.min(position, self.kernel.window)
                cost = (T.truncdiv(seen, T.int32(_BLOCK)) + 1) * count
                body(request, first, count, T.bind(T.Cast("int64", cost)))

    # ---- one query block

    def _work(self, request: Expr, first: Expr, rows: Expr, head: Expr) -> None:
        with T.serial(0, rows) as row:
            query_head = head * self.group + T.truncmod(first + row, T.int32(self.group))
            if self.kernel.sinks:
                sink = T.bind(self.env["sinks"][query_head])
                T.buffer_store(self.maxima, sink, [row])
                store(self.sums, row * LANES, splat(1.0 / LANES), "f32")
            else:
                T.buffer_store(self.maxima, T.float32(float("-inf")), [row])
                store(self.sums, row * LANES, splat(0.0), "f32")
            for i in range(self.value_vectors):
                store(self.totals, (row * self.value_vectors + i) * LANES, splat(0.0), "f32")

        lowest, _ = self._seen(request, first)
        _, highest = self._seen(request, first + rows - 1)
        with T.serial(T.truncdiv(lowest, T.int32(_BLOCK)), T.truncdiv(highest - 1, T.int32(_BLOCK)) + 1) as block:
            tiles = T.truncdiv(rows + (self.height - 1), T.int32(self.height))
            with T.serial(0, tiles) as tile:
                row = T.bind(tile * self.height)
                here = T.bind(T.min(rows - row, self.height))
                self._tile(request, first, row, here, head, block)

        with T.serial(0, rows) as row:
            self._finish(request, first + row, row, head)

    def _token(self, request: Expr, row: Expr) -> Expr:
        """The token (row of q) of a row of the request."""
        return self.env["start"][request] + T.truncdiv(row, T.int32(self.group))

    def _seen(self, request: Expr, row: Expr) -> tuple[Expr, Expr]:
        """[first, last) of the cached tokens that a row sees."""
        position = T.bind(self.env["pos"][self._token(request, row)])
        first = T.bind(T.max(position - (self.kernel.window - 1), 0)) if self.kernel.window else T.int32(0)
        return first, T.bind(position + 1)

    def _query(self, request: Expr, row: Expr, *, head: Expr, width: int) -> Expr:
        """The offset of a row's elements in q (width k_dim) or out (width v_dim)."""
        query_head = head * self.group + T.truncmod(row, T.int32(self.group))
        index = T.Cast("int64", self._token(request, row)) * self.kernel.q_heads + T.Cast("int64", query_head)
        return T.bind(index * width)

    def _tile(self, request: Expr, first: Expr, row: Expr, here: Expr, head: Expr, block: Expr) -> None:
        base = T.bind(block * _BLOCK)
        lowest, low_end = self._seen(request, first + row)
        high_start, high_end = self._seen(request, first + row + here - 1)
        # The first row of a tile sees no further than the last one, and from no later on.
        with T.If(T.And(lowest < base + _BLOCK, high_end > base)), T.Then():
            start = T.bind(T.truncdiv(T.max(lowest - base, 0), T.int32(PAGE)))
            stop = T.bind(T.truncdiv(T.min(high_end - base, _BLOCK) - 1, T.int32(PAGE)))
            # A page that no row sees may not exist: in its place one that exists is scored, and its scores are masked.
            numbers = [T.max(T.min(T.int32(i), stop), start) for i in range(_BLOCK_PAGES)]
            pages = [self.pages.page(request, block * _BLOCK_PAGES + number, head) for number in numbers]
            last = T.truncdiv(high_end - 1, T.int32(PAGE))
            for i, page in enumerate(pages):
                T.buffer_store(self.values, self.pages.values(page), [i])
                after = T.min(block * _BLOCK_PAGES + (_BLOCK_PAGES + i), last)
                T.buffer_store(self.next_keys, self.pages.page(request, after, head), [i])

            sizes = range(1, self.height + 1)
            queries = partial(self._query, request, head=head, width=self.layout.k_dim)
            choose(here, {count: partial(self._score, queries, first + row, count, pages) for count in sizes})
            with T.If(T.And(high_start <= base, low_end >= base + _BLOCK)):
                with T.Then():
                    with T.serial(0, here) as i:
                        self._weigh(i, row + i, None)
                    choose(here, {count: partial(self._add_values, row, count) for count in sizes})
                with T.Else(), T.serial(0, here) as i:
                    one = T.bind(row + i)
                    begin, end = self._seen(request, first + one)
                    lo = T.bind(T.max(begin - base, 0))
                    hi = T.bind(T.min(end - base, _BLOCK))
                    with T.If(lo < hi), T.Then():
                        self._weigh(i, one, (lo, hi))
                        self._add_seen_values(i, one, lo, hi)

    # ---- scores and values of one tile

    def _score(self, query: Callable[[Expr], Expr], row: Expr, count: int, pages: list[Expr]) -> None:
        """scores = q . k for `count` rows from `row` of the request on."""
        queries = [query(row + i) for i in range(count)]
        width = tile_width(self.isa, self.layout.dtype, count)
        for group in range(0, _BLOCK_PAGES, width):
            totals = self._dots(queries, pages[group : group + width])
            for i in range(count):
                for j in range(width):
                    store(self.scores, T.int32(i * _BLOCK + (group + j) * LANES), totals[i * width + j], "f32")

    def _dots(self, queries: list[Expr], pages: list[Expr]) -> Vectors:
        """q . k for some rows by some pages; meanwhile the values of these pages are on their way."""
        totals = Vectors(len(queries) * len(pages))
        for i in range(len(queries) * len(pages)):
            totals[i] = splat(0.0)
        with T.serial(0, self.steps) as step:
            keys = [self._row(page + step * self.layout.k_row_bytes) for page in pages]
            for page in pages:
                self._prefetch(self.pages.values(page) + step * _LINE)
            for i, query in enumerate(queries):
                operand = self._pair(self.env["q"], query, step)
                for j, key in enumerate(keys):
                    totals[i * len(keys) + j] = self._multiply(totals[i * len(keys) + j], operand, key)
        return totals

    def _add_values(self, row: Expr, count: int) -> None:
        """acc += p @ v for `count` rows that see the whole block."""
        width = tile_width(self.isa, self.layout.dtype, count)
        for vector in range(0, self.value_vectors, width):
            self._add_to_vectors(row, count, range(vector, min(vector + width, self.value_vectors)))

    def _add_to_vectors(self, row: Expr, count: int, vectors: range) -> None:
        sums = Vectors(count * len(vectors))
        for i in range(count):
            for j, vector in enumerate(vectors):
                sums[i * len(vectors) + j] = load(self.totals, self._total(row + i, vector), "f32")
        steps = _BLOCK // 2 if self.bf16 else _BLOCK
        lines = -(-PAGE * self.layout.k_dim * self.layout.element_bytes // (_LINE * steps))
        # One loop over the block and not one per page, which LLVM would unroll for every tile size.
        with T.serial(0, steps) as step:
            at = self._value_row(step)
            values = [self._value(at, vector) for vector in vectors]
            if vectors.start == 0:
                # the keys of the next block, spread over this loop
                for page in range(_BLOCK_PAGES):
                    for line in range(lines):
                        self._prefetch(self.next_keys[page] + (step * lines + line) * _LINE)
            for i in range(count):
                operand = self._pair(self.weights, T.int32(i * _BLOCK), step)
                for j, value in enumerate(values):
                    sums[i * len(vectors) + j] = self._multiply(sums[i * len(vectors) + j], operand, value)
        for i in range(count):
            for j, vector in enumerate(vectors):
                store(self.totals, self._total(row + i, vector), sums[i * len(vectors) + j], "f32")

    def _add_seen_values(self, tile_row: Expr, row: Expr, lo: Expr, hi: Expr) -> None:
        """acc += p @ v for one row that sees tokens lo .. hi-1 of the block; other values are not looked at."""
        sums = Vectors(self.value_vectors)
        for vector in range(self.value_vectors):
            sums[vector] = load(self.totals, self._total(row, vector), "f32")
        weights = T.bind(tile_row * _BLOCK)
        if self.bf16:
            with T.serial(T.truncdiv(lo, T.int32(2)), T.truncdiv(hi + 1, T.int32(2))) as pair:
                # the half of a pair that is out of sight may hold anything
                first_seen = T.Select(pair * 2 >= lo, T.int32(0xFFFF), T.int32(0))
                second_seen = T.Select(pair * 2 + 1 < hi, T.int32(-0x10000), T.int32(0))
                mask = T.bind(T.broadcast(T.bitwise_or(first_seen, second_seen), LANES))
                operand = self._pair(self.weights, weights, pair)
                at = self._value_row(pair)
                for vector in range(self.value_vectors):
                    value = T.bitwise_and(self._value(at, vector), mask)
                    sums[vector] = self._multiply(sums[vector], operand, value)
        else:
            with T.serial(lo, hi) as slot:
                operand = self._pair(self.weights, weights, slot)
                at = self._value_row(slot)
                for vector in range(self.value_vectors):
                    sums[vector] = fma(operand, self._value(at, vector), sums[vector])
        for vector in range(self.value_vectors):
            store(self.totals, self._total(row, vector), sums[vector], "f32")

    # ---- the softmax

    def _weigh(self, tile_row: Expr, row: Expr, seen: tuple[Expr, Expr] | None) -> None:
        """Turns a row's 64 scores into weights and brings its maximum, sum and accumulators up to date."""
        kernel = self.kernel
        factor = splat(kernel.softcap or kernel.scale)
        scores = []
        for i in range(_BLOCK_PAGES):
            score = load(self.scores, tile_row * _BLOCK + i * LANES, "f32")
            if kernel.softcap:
                score = tanh(score * splat(kernel.scale) * splat(1.0 / kernel.softcap))
            scores.append(T.bind(score))

        def only_seen(i: int, value: Expr, other: float) -> Expr:
            if seen is None:
                return value
            return keep_between(value, seen[0] - i * LANES, seen[1] - i * LANES, other)

        tops = [only_seen(i, score * factor, float("-inf")) for i, score in enumerate(scores)]
        top = T.bind(maximum(maximum(tops[0], tops[1]), maximum(tops[2], tops[3])))
        before = T.bind(self.maxima[row])
        highest = T.bind(horizontal_max(top))
        now = T.bind(T.Select(before < highest, highest, before))
        T.buffer_store(self.maxima, now, [row])
        lower = T.bind(splat(0.0) - splat(now))
        with T.If(before < highest), T.Then():
            shrink = exp_of_negative(splat(before) + lower)
            store(self.sums, row * LANES, load(self.sums, row * LANES, "f32") * shrink, "f32")
            for vector in range(self.value_vectors):
                at = self._total(row, vector)
                store(self.totals, at, load(self.totals, at, "f32") * shrink, "f32")
        weights = []
        for i, score in enumerate(scores):
            weight = T.bind(only_seen(i, exp_of_negative(fma(score, factor, lower)), 0.0))
            weights.append(weight)
            store(self.weights, tile_row * _BLOCK + i * LANES, weight, self.layout.dtype)
        added = (weights[0] + weights[1]) + (weights[2] + weights[3])
        store(self.sums, row * LANES, load(self.sums, row * LANES, "f32") + added, "f32")

    def _finish(self, request: Expr, row: Expr, local: Expr, head: Expr) -> None:
        """out = acc / l."""
        inverse = T.bind(splat(T.float32(1.0) / horizontal_sum(load(self.sums, local * LANES, "f32"))))
        to = self._query(request, row, head=head, width=self.layout.v_dim)
        for vector in range(self.value_vectors):
            valid = min(self.layout.v_dim - vector * LANES, LANES)
            value = load(self.totals, self._total(local, vector), "f32") * inverse
            store_part(self.env["out"], to + vector * LANES, value, valid, self.layout.dtype)

    # ---- memory

    @staticmethod
    def _local(count: int, dtype: str) -> Expr:
        return T.alloc_buffer((count,), dtype, scope="local")

    def _total(self, row: Expr, vector: int) -> Expr:
        return (row * self.value_vectors + vector) * LANES

    def _row(self, offset: Expr) -> Expr:
        """One vector of K."""
        where = address(self.env["kv"], offset)
        if self.bf16:
            return T.bind(T.call_extern("int32x16", "xllm_load_i32", where))
        return T.bind(T.call_extern("float32x16", "xllm_load_f32", where))

    def _prefetch(self, offset: Expr) -> None:
        T.evaluate(T.call_extern("int32", "xllm_prefetch", address(self.env["kv"], offset)))

    def _value_row(self, step: Expr) -> Expr:
        """The address of one token's values (f32) or a pair of tokens' (bf16) in the block."""
        rows = PAGE // 2 if self.bf16 else PAGE
        base = self.values[T.shift_right(step, T.int32(int(math.log2(rows))))]
        return T.bind(base + T.bitwise_and(step, T.int32(rows - 1)) * self.layout.v_row_bytes)

    def _value(self, offset: Expr, vector: int) -> Expr:
        """One vector of V; lanes past v_dim are 0."""
        valid = min(self.layout.v_dim - vector * LANES, LANES)
        where = address(self.env["kv"], offset + vector * LANES * 4)
        kind, first = ("int32x16", "i32") if self.bf16 else ("float32x16", "f32")
        if valid == LANES:
            return T.bind(T.call_extern(kind, f"xllm_load_{first}", where))
        return T.bind(T.call_extern(kind, f"xllm_load_first_{first}", where, T.int32(valid)))

    def _pair(self, buffer: Expr, base: Expr, step: Expr) -> Expr:
        """One element (f32) or pair (bf16) in all lanes."""
        if not self.bf16:
            return T.bind(splat(buffer[base + step]))
        return T.bind(T.broadcast(T.call_extern("int32", "xllm_load_pair", address(buffer, base + step * 2)), LANES))

    def _multiply(self, total: Expr, operand: Expr, vector: Expr) -> Expr:
        if self.bf16:
            return T.call_pure_extern("float32x16", "xllm_dot_bf16", total, operand, vector)
        return fma(operand, vector, total)
