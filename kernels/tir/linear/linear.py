"""Linear layers over packed panels: `Linear` and `LinearGlu`, and the loop over register tiles that they share.

One loop serves decode and prefill. A tile is up to 8 rows by one 64-column panel. A piece of work is all tiles of a
panel, or some of them where there are few panels and many rows. Pieces are numbered panel by panel, and members steal
them from each other (work_stealing.py). So with few rows one member reads each panel once, front to back. With many
rows a panel stays in the second-level cache while all rows are multiplied by it. Rows are cut into equal tiles, and the
lines that are needed next are prefetched meanwhile.

Each output element is one f32 accumulator over k in order (for bf16, pairs of k as the dot instruction adds them). So a
row's bits do not depend on the other rows, on the tile or on the team.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tvm.tirx.script.builder import ir as T

from xllm_compiler.kernels.tir.codegen.builder import (
    Scalars,
    address_of,
    build_function,
    choose,
    hold,
    load,
    load_part,
    share,
    stack_array,
    store,
    store_part,
)
from xllm_compiler.kernels.tir.codegen.kernel import MEMBER_ARGS, Arg, Kernel, require, scalar
from xllm_compiler.kernels.tir.codegen.vmath import ACTIVATIONS
from xllm_compiler.kernels.tir.codegen.work_stealing import WORK_QUEUES, steal_work
from xllm_compiler.kernels.tir.isa.levels import LANES, Isa
from xllm_compiler.kernels.tir.linear.blocks import BlockSums
from xllm_compiler.kernels.tir.linear.reader import Prefetch, Site, WeightReader
from xllm_compiler.kernels.tir.linear.readers import reader
from xllm_compiler.kernels.tir.linear.widened_rows import WideRows
from xllm_compiler.weight_formats import PANEL

Expr = Any
_DTYPES = ("bf16", "f32")
MOST_ROWS = 8  # of a register tile, unless a kernel says otherwise
_UNPACKED_BYTES = 1 << 19  # at most, of a panel that is unpacked for all rows: it lies on the stack
_UNPACKED_ROWS = 32  # at least, for a panel to be unpacked: fewer are faster with the panel as it is stored
_LINE = 64  # bytes of a cache line
_PREFETCH_DISTANCE = 1 << 14  # bytes from what is multiplied to what is prefetched: memory takes some 2 us for them
_PIECES = 32  # of work for each member, where there are enough rows: a member is late by one piece at most
_UNBOUNDED = 1 << 30  # rows
NEXT = Arg("next", "u8", "the weight of the linear layer that is called next")
NEXT_PANELS, NEXT_BYTES = scalar("next_panels"), scalar("next_bytes")
"""How many panels that weight has, and the bytes of one; 0 where no layer follows. A member prefetches its part at the
end of its share. So it arrives while the others finish and while the ops between the layers run."""
_TAIL = (NEXT, WORK_QUEUES, scalar("rows"), NEXT_PANELS, NEXT_BYTES, *MEMBER_ARGS)


@dataclass(frozen=True)
class Linear(Kernel):
    """y[rows, n] = act(x[rows, k] @ w.T + bias) + residual, rounded once to `out`.

    `weights` names the weight format: "q8", "q4g32" .. where x is quantized too, "wq8" .. where it is not (readers.py).
    Where it is "", w is in `panel` layout, and x and w are in `dtype`. Bias and residual are always in `dtype`.
    `most_rows`: rows of a register tile at most; None: MOST_ROWS. It changes no bit.
    """

    k: int
    n: int
    dtype: str
    out: str
    bias: bool = False
    residual: bool = False
    act: str = "none"
    weights: str = ""
    most_rows: int | None = None

    def __post_init__(self) -> None:
        require(self.k > 0 and self.n > 0, f"linear of {self.k} by {self.n}", self)
        require(self.dtype in _DTYPES and self.out in _DTYPES, f"linear {self.dtype} to {self.out}", self)
        require(self.act in ACTIVATIONS, f"activation {self.act!r}", self)

    @property
    def int8_dots(self) -> bool:
        return reader(self.dtype, self.weights).int8_dots

    @property
    def panels(self) -> tuple[int, int]:
        """How many panels the weight has, and the bytes of one."""
        return -(-self.n // PANEL), reader(self.dtype, self.weights).panel_bytes(self.k)

    @property
    def args(self) -> tuple[Arg, ...]:
        pointers = [*reader(self.dtype, self.weights).args(self.k, f"panels of {self.n}")]
        if self.bias:
            pointers.append(Arg("bias", self.dtype, f"{self.n}"))
        if self.residual:
            pointers.append(Arg("residual", self.dtype, f"rows, {self.n}"))
        pointers.append(Arg("y", self.out, f"rows, {self.n}", written=True))
        return (*pointers, *_TAIL)

    def build(self, isa: Isa) -> Any:
        def finish(env: dict[str, Expr], row: Expr, panel: Expr, totals: Sequence[Expr], columns: int) -> None:
            for vector, total in enumerate(totals):
                count = min(columns - vector * LANES, LANES)
                if count <= 0:
                    continue
                at = T.bind(panel * PANEL + vector * LANES)
                if self.bias:
                    total = total + load_part(env["bias"], at, count, self.dtype)
                total = ACTIVATIONS[self.act](total)
                where = T.bind(T.Cast("int64", row) * self.n + at)
                if self.residual:
                    total = total + load_part(env["residual"], where, count, self.dtype)
                store_part(env["y"], where, total, count, self.out)

        return build_function(self, isa, panel_loop(self, isa, finish))


@dataclass(frozen=True)
class LinearGlu(Kernel):
    """y[rows, f] = act(g) * u, where g and u are the first and second f columns of x[rows, k] @ w.T + bias.

    w is in `glu` layout. bias is [2*f], gate then up, as in the checkpoint. `dtype`, `weights` and `most_rows` are
    those of `Linear`.
    """

    k: int
    f: int
    dtype: str
    act: str = "silu"
    bias: bool = False
    weights: str = ""
    most_rows: int | None = None

    def __post_init__(self) -> None:
        require(self.k > 0 and self.f > 0, f"gated linear of {self.k} by {self.f}", self)
        require(self.dtype in _DTYPES, f"gated linear in {self.dtype}", self)
        require(self.act in ACTIVATIONS, f"activation {self.act!r}", self)

    @property
    def int8_dots(self) -> bool:
        return reader(self.dtype, self.weights).int8_dots

    @property
    def panels(self) -> tuple[int, int]:
        """As of `Linear`."""
        return -(-self.f // (PANEL // 2)), reader(self.dtype, self.weights).panel_bytes(self.k)

    @property
    def args(self) -> tuple[Arg, ...]:
        pointers = [*reader(self.dtype, self.weights).args(self.k, f"glu panels of {self.f}")]
        if self.bias:
            pointers.append(Arg("bias", self.dtype, f"2 * {self.f}"))
        pointers.append(Arg("y", self.dtype, f"rows, {self.f}", written=True))
        return (*pointers, *_TAIL)

    def build(self, isa: Isa) -> Any:
        half = PANEL // 2

        def finish(env: dict[str, Expr], row: Expr, panel: Expr, totals: Sequence[Expr], columns: int) -> None:
            for vector in range(half // LANES):
                count = min(columns - vector * LANES, LANES)
                if count <= 0:
                    continue
                gate, up = totals[vector], totals[vector + half // LANES]
                at = T.bind(panel * half + vector * LANES)
                if self.bias:
                    gate = gate + load_part(env["bias"], at, count, self.dtype)
                    up = up + load_part(env["bias"], at + self.f, count, self.dtype)
                value = ACTIVATIONS[self.act](gate) * up
                store_part(env["y"], T.Cast("int64", row) * self.f + at, value, count, self.dtype)

        loop = _Loop(isa, self.k, self.f, _reader(self, isa), half, finish, self.most_rows or MOST_ROWS)
        return build_function(self, isa, loop.emit)


def _no_prefetch(block: Expr, of: Expr | int) -> None:
    """A `Prefetch` that emits nothing."""


Finish = Callable[[dict[str, Expr], Expr, Expr, Sequence[Expr], int], None]


def panel_loop(kernel: Linear, isa: Isa, finish: Finish) -> Callable[..., None]:
    """The body of a kernel that computes the sums of `kernel`, panel by panel, and gives them to `finish` (see
    `_Loop`)."""
    return _Loop(isa, kernel.k, kernel.n, _reader(kernel, isa), PANEL, finish, kernel.most_rows or MOST_ROWS).emit


def tile_height(kernel: Linear | LinearGlu, isa: Isa) -> int:
    """Rows of the register tile that a kernel uses where it has enough rows."""
    return _reader(kernel, isa).height(isa, kernel.most_rows or MOST_ROWS)


def _reader(kernel: Linear | LinearGlu, isa: Isa) -> WeightReader:
    """How a kernel's weight is read at this level."""
    return reader(kernel.dtype, kernel.weights).at(isa, kernel.k)


@dataclass(frozen=True)
class _Loop:
    """The loop over tiles that all linear kernels share.

    `n` columns of y, `columns` of them for each panel. `finish(env, row, panel, totals, columns)` turns the sums of a
    row's four vectors into y; there `columns` is how many of the panel exist.
    """

    isa: Isa
    k: int
    n: int
    reader: WeightReader
    columns: int
    finish: Finish
    most_rows: int

    def emit(self, **env: Expr) -> None:
        env["prefetched"] = Scalars(1, "int64")  # the address of the panel to prefetch
        if self.reader.widens(self.isa, self.k):
            env["wide"] = WideRows(env["x"], self.k)
        by_blocks = self.reader.blocks(Site(self.isa, self.k, self.most_rows, env, partial(self._prefetch, env)))
        most = by_blocks.block_rows if by_blocks else self._height
        sums = stack_array(most * PANEL, "float32")
        if by_blocks is None:
            self._by_vectors(env, sums)
        elif by_blocks.fewest == 1 and by_blocks.greatest is None:
            self._by_blocks(env, sums, by_blocks)
        else:
            blocks = env["rows"] >= by_blocks.fewest
            if by_blocks.greatest is not None:
                blocks = T.And(blocks, env["rows"] <= by_blocks.greatest)
            with T.If(blocks):
                with T.Then():
                    self._by_blocks(env, sums, by_blocks)
                with T.Else():
                    self._by_vectors(env, sums)

    def _by_vectors(self, env: dict[str, Expr], sums: Expr) -> None:
        env = {**env, **self.reader.scratch(self.isa, self.k, self._height)}
        unpacked = self.reader.unpacked_bytes(self.k)
        if self.isa.has_amx or not 0 < unpacked <= _UNPACKED_BYTES:
            self._pieces(env, sums, None)
            return
        with T.If(env["rows"] < _UNPACKED_ROWS):
            with T.Then():
                self._pieces(env, sums, None)
            with T.Else():
                self._pieces({**env, "unpacked": stack_array(unpacked, "uint8")}, sums, None)

    def _by_blocks(self, env: dict[str, Expr], sums: Expr, by_blocks: BlockSums) -> None:
        self._pieces(env, sums, by_blocks)
        by_blocks.release()

    def _pieces(self, env: dict[str, Expr], sums: Expr, by_blocks: BlockSums | None) -> None:
        """Computes the pieces of y that this member gets. A piece is some tiles of rows by one panel."""
        rows, panels = env["rows"], -(-self.n // self.columns)
        height = by_blocks.block_rows if by_blocks else self._height
        if by_blocks:
            most = by_blocks.most_rows
        else:
            most = WideRows.most(self.k) // height * height if "wide" in env else _UNBOUNDED
        rounds = hold(T.truncdiv(rows + (most - 1), T.int32(most)))
        parts = hold(T.truncdiv(env["team"] * _PIECES + (panels - 1), T.max(rounds, 1) * panels))
        parts = hold(T.max(T.min(parts, T.truncdiv(T.min(rows, most) + (height - 1), T.int32(height))), 1))
        unpacked = Scalars(1, "int32")
        unpacked[0] = T.int32(-1)

        def piece(number: Expr, onward: Expr) -> None:
            panel_at = hold(T.truncdiv(number, parts))
            part = hold(number - panel_at * parts)
            round_of = hold(T.truncdiv(panel_at, T.int32(panels)))
            panel = hold(panel_at - round_of * panels)
            top = hold(round_of * most)
            here = hold(T.min(rows - top, most))
            tiles = hold(T.truncdiv(here + (height - 1), T.int32(height)))
            env["prefetched"][0] = self._address_to_prefetch(env, panel, onward)
            if by_blocks:
                by_blocks.take(top, here)
            elif "wide" in env:
                env["wide"].take(top, here)
            lo, hi = hold(T.truncdiv(tiles * part, parts)), hold(T.truncdiv(tiles * (part + 1), parts))
            if by_blocks or "unpacked" in env:
                with T.If(panel != unpacked[0]), T.Then():
                    if by_blocks:
                        by_blocks.begin(panel)
                    else:
                        self.reader.unpack(env, self.k, panel)
                    unpacked[0] = panel
            with T.serial(lo, hi) as tile:
                self._tile(env, top, here, panel, (tile, tiles), sums, by_blocks)

        steal_work(rounds * panels * parts, env["turns"], env["member"], env["team"], piece)

    def _tile(
        self,
        env: dict[str, Expr],
        top: Expr,
        rows: Expr,
        panel: Expr,
        place: tuple[Expr, Expr],
        sums: Expr,
        by_blocks: BlockSums | None,
    ) -> None:
        """Computes one tile of `rows` rows from row `top` on, by a panel. `place`: the tile's number, and how many
        tiles there are."""
        tile, tiles = place
        if by_blocks:
            row = T.bind(top + tile * by_blocks.block_rows)
            here = T.bind(T.min(rows - tile * by_blocks.block_rows, by_blocks.block_rows))
            by_blocks.emit(row, here, panel, place, sums)
        else:
            # rows in equal parts: of 8 rows, tiles of 4 and 4 keep the arithmetic units busier than 6 and 2
            row = T.bind(top + T.truncdiv(rows * tile, tiles))
            here = T.bind(T.truncdiv(rows * (tile + 1), tiles) - (row - top))
            sizes = range(1, self._height + 1)
            choose(here, {n: partial(self._accumulate, env, row, n, panel, place, sums) for n in sizes})
        # Here and not in each tile size, so that the code of an activation exists once.
        with T.serial(0, here) as i:
            self._finish(env, T.bind(row + i), panel, sums, T.bind(i * PANEL), by_blocks)

    @property
    def _height(self) -> int:
        return self.reader.height(self.isa, self.most_rows)

    def _finish(
        self,
        env: dict[str, Expr],
        row: Expr,
        panel: Expr,
        sums: Expr,
        at: Expr,
        by_blocks: BlockSums | None,
    ) -> None:
        panels = -(-self.n // self.columns)
        totals = [T.bind(load(sums, at + vector, "f32")) for vector in range(0, PANEL, LANES)]
        if by_blocks:
            totals = by_blocks.totals(row, panel, totals)
        tail = self.n - (panels - 1) * self.columns
        if tail == self.columns:
            self.finish(env, row, panel, totals, tail)
            return
        with T.If(panel < panels - 1):
            with T.Then():
                self.finish(env, row, panel, totals, self.columns)
            with T.Else():
                self.finish(env, row, panel, totals, tail)

    def _accumulate(
        self, env: dict[str, Expr], row: Expr, count: int, panel: Expr, place: tuple[Expr, Expr], sums: Expr
    ) -> None:
        """Emits sums[i, vector] = x[row + i] @ the panel, for `count` rows, one register tile after the other."""
        width = self.reader.width(self.isa, count)
        passes = PANEL // LANES // width
        tile, tiles = place
        streamed = count <= self.isa.streamed_rows and self.reader.streams(self.isa)
        for number in range(passes):
            vectors = range(number * width, (number + 1) * width)
            loop = tile * passes + number, tiles * passes
            prefetch = _no_prefetch if streamed else self._prefetch(env, panel, loop, passes == 1 and tiles == 1)
            totals = self.reader.tile(env, self.k, row, count, panel, vectors, prefetch)
            for i in range(count):
                for j, vector in enumerate(vectors):
                    store(sums, T.int32(i * PANEL + vector * LANES), totals[i * len(vectors) + j], "f32")

    def _prefetch(self, env: dict[str, Expr], panel: Expr, loop: tuple[Expr, Expr], along: Expr | bool) -> Prefetch:
        """What prefetches lines of weights while a panel is multiplied, a few lines before each block of steps.

        With more than a few rows, the arithmetic keeps the processor from reading far enough ahead by itself. All
        register tiles that read this panel loop over k, and each loop prefetches an equal part of the lines. `loop`:
        the number of this loop, and how many there are.

        `along`: the loops run along the panel together, each part of it being read for the first time. Then they
        prefetch what lies `_PREFETCH_DISTANCE` further on. The rest of a deep panel and the next panel together would
        not fit a second-level cache that is shared. Otherwise they prefetch the next panel.
        """
        size = self.reader.panel_bytes(self.k)
        lines = -(-size // _LINE)
        near = min(_PREFETCH_DISTANCE // _LINE, lines)
        number, of_all = loop

        def prefetch(block: Expr, of: Expr | int) -> None:
            each = T.bind(T.truncdiv(lines + (of_all * of - 1), of_all * of))
            first = T.bind(T.min((number * of + block) * each, lines))
            last = T.bind(T.min(first + each, lines))
            start = T.bind(env["prefetched"][0])
            if along is not False:
                distance = T.bind(T.if_then_else(along, T.int32(near), T.int32(lines)))
                onward = start + T.Cast("int64", distance - lines) * _LINE
                own = address_of(env["w"]) + T.Cast("int64", panel) * size + T.Cast("int64", distance) * _LINE
                start = T.bind(T.if_then_else(first + distance < lines, own, onward))
            with T.serial(first, last) as line:
                T.evaluate(T.call_extern("int32", "xllm_prefetch_at", start + T.Cast("int64", line) * _LINE))

        return prefetch

    def _address_to_prefetch(self, env: dict[str, Expr], panel: Expr, onward: Expr) -> Expr:
        """The address of the panel to prefetch while `panel` is multiplied: the panel `onward` from it. Where `onward`
        is 0, it is where this member's share of the next layer begins."""
        first, _ = share(env["next_panels"], env["member"], env["team"])
        following = address_of(env["next"]) + T.Cast("int64", first) * T.Cast("int64", env["next_bytes"])
        beside = T.Cast("int64", panel) + T.Cast("int64", onward)
        own = address_of(env["w"]) + beside * self.reader.panel_bytes(self.k)
        return T.if_then_else(onward == 0, following, own)
