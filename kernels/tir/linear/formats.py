"""How the register tile of a linear layer reads its weight: `Dense` and `Quantized`. Owns the inner loops over k.

A format says which arguments hold activations and weight, how large a tile its registers allow, and emits the sums
x[row + i] @ w.T of one tile as f32. What is done with the sums, and the walk over tiles, is linear.py's. Whatever the
tile, one output element is computed by the same operations in the same order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tvm.tirx.script.builder import ir as T

from xllm_compiler.kernels.layouts import QUAD, STEP, Quantization
from xllm_compiler.kernels.tir.codegen.builder import Vectors, address, fma, halves, load, splat, tile_rows, tile_width
from xllm_compiler.kernels.tir.codegen.kernel import PANEL, Arg
from xllm_compiler.kernels.tir.isa.levels import LANES, Isa
from xllm_compiler.kernels.tir.linear.grid_bytes import Run, each_run
from xllm_compiler.kernels.tir.linear.widened_rows import WideRows

Expr = Any
_BYTE_STEP = PANEL * QUAD  # bytes of one load step of a quantized panel
_BLOCK = 8  # steps between two requests for weights that will be needed later

Ahead = Callable[[Expr, Expr | int], None]
"""`ahead(block, of)`: block number `block` of the `of` that a register tile's walk over k has begins."""


class WeightFormat(ABC):
    """What a linear kernel asks of its weight."""

    @property
    @abstractmethod
    def element_bytes(self) -> int:
        """Bytes of one element of argument `w`."""

    @abstractmethod
    def args(self, k: int, rows_of: str) -> tuple[Arg, ...]:
        """Activations, then the weight; `rows_of` describes its packed rows."""

    @abstractmethod
    def width(self, isa: Isa, rows: int) -> int:
        """Vectors, 4, 2, 1 or none, of a register tile of `rows` rows."""

    def height(self, isa: Isa, most: int) -> int:
        """Rows, at most `most`, of the register tile that is used where there are rows enough."""
        return tile_rows(partial(self.width, isa), most)

    def widens(self, isa: Isa, k: int) -> bool:
        """Whether tiles want the rows of x in env["wide"]."""
        return False

    @abstractmethod
    def panel_bytes(self, k: int) -> int:
        """Bytes of one panel of the weight."""

    @abstractmethod
    def tile(
        self, env: dict[str, Expr], k: int, row: Expr, count: int, panel: Expr, at: range, ahead: Ahead
    ) -> list[Expr]:
        """Sums of `count` rows by the vectors `at` of a panel, row by row, as f32. Where `env` has "opened", that is
        the panel as `open` left it."""

    def streams(self, isa: Isa) -> bool:
        """Whether a row is an instruction or two for each vector of weights."""
        return False

    def opened_bytes(self, k: int) -> int:
        """Bytes of a panel that is taken apart once, where it meets many rows; 0: it is always met as it is stored."""
        return 0

    def open(self, env: dict[str, Expr], k: int, panel: Expr) -> None:
        """Emits: takes a panel apart, into env["opened"]: the same values in the form in which they are multiplied."""
        raise AssertionError("opened_bytes says 0")


def in_blocks(steps: Expr | int, ahead: Ahead, body: Callable[[Expr], None]) -> None:
    """`body(step)` for all steps in order, telling `ahead` about every block of them. Where their number is known at
    run time only, it is one of whole blocks."""
    whole, rest = divmod(steps, _BLOCK) if isinstance(steps, int) else (T.truncdiv(steps, T.int32(_BLOCK)), 0)
    blocks = whole + (rest > 0)
    if not isinstance(whole, int) or whole:
        with T.serial(0, whole) as block:
            ahead(block, blocks)
            with T.serial(0, _BLOCK) as step:
                body(T.bind(block * _BLOCK + step))
    if rest:
        ahead(T.int32(whole), blocks)
        with T.serial(whole * _BLOCK, steps) as step:
            body(step)


@dataclass(frozen=True)
class Dense(WeightFormat):
    """The weight in the type of x: f32, or bf16 in pairs along k. One f32 accumulator per element, k in order."""

    dtype: str

    @property
    def element_bytes(self) -> int:
        return 4 if self.dtype == "f32" else 2

    def args(self, k: int, rows_of: str) -> tuple[Arg, ...]:
        return (Arg("x", self.dtype, f"rows, {k}"), Arg("w", self.dtype, f"{rows_of}, {k}"))

    def width(self, isa: Isa, rows: int) -> int:
        return tile_width(isa, self.dtype, rows)

    def streams(self, isa: Isa) -> bool:
        return True

    def widens(self, isa: Isa, k: int) -> bool:
        return k % 2 == 0 and WideRows.can(isa, self.dtype, k)

    def panel_bytes(self, k: int) -> int:
        return 4 * PANEL * (k if self.dtype == "f32" else -(-k // 2))

    def tile(
        self, env: dict[str, Expr], k: int, row: Expr, count: int, panel: Expr, at: range, ahead: Ahead
    ) -> list[Expr]:
        totals = Vectors(count * len(at))
        for index in range(count * len(at)):
            totals[index] = splat(0.0)
        weights = self.begins(k, panel)
        self.multiply(env, totals, weights, k, row, T.int32(0), count, at, k, ahead)
        if self.dtype == "bf16" and k % 2:
            # the last of an odd number: its partner in the pair is zero, not the next row's first
            last = T.bind(T.Cast("int64", row) * k + (k - 1))
            single = [T.Cast("int32", env["x"][last + i * k]) for i in range(count)]
            operands = [T.bind(T.broadcast(value, LANES)) for value in single]
            self._add(env, totals, weights + k // 2 * PANEL, at, operands)
        return [totals[index] for index in range(count * len(at))]

    def begins(self, k: int, panel: Expr) -> Expr:
        """Where a panel does: its number of f32, or of pairs."""
        return T.bind(T.Cast("int64", panel) * (PANEL * (k if self.dtype == "f32" else -(-k // 2))))

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
        ahead: Ahead,
    ) -> None:
        """totals += the weights from number `weights` on times `count` rows from k = `begin` on, over `length` k, of
        which bf16 takes pairs."""
        origin = T.bind(T.Cast("int64", row) * k + begin)

        def step(number: Expr) -> None:
            operands = [self._operand(env["x"], origin + i * k, number) for i in range(count)]
            self._add(env, totals, weights + number * PANEL, at, operands)

        in_blocks(length if self.dtype == "f32" else length // 2, ahead, step)

    def _add(self, env: dict[str, Expr], totals: Vectors, weights: Expr, at: range, operands: list[Expr]) -> None:
        """totals += one step."""
        columns = [self._weight(env["w"], weights + vector * LANES) for vector in at]
        for i, operand in enumerate(operands):
            for j, column in enumerate(columns):
                index = i * len(at) + j
                totals[index] = self._multiply(totals[index], operand, column)

    def _operand(self, x: Expr, start: Expr, step: Expr) -> Expr:
        if self.dtype == "f32":
            return T.bind(splat(x[start + step]))
        pair = T.call_extern("int32", "xllm_load_pair", address(x, start + step * 2))
        return T.bind(T.broadcast(pair, LANES))

    def _weight(self, w: Expr, index: Expr) -> Expr:
        if self.dtype == "f32":
            return T.bind(load(w, index, "f32"))
        return T.bind(T.call_extern("int32x16", "xllm_load_i32", address(w, index * 2)))

    def _multiply(self, total: Expr, operand: Expr, weight: Expr) -> Expr:
        if self.dtype == "f32":
            return fma(operand, weight, total)
        return T.call_pure_extern("float32x16", "xllm_dot_bf16", total, operand, weight)


@dataclass(frozen=True)
class Widened(Dense):
    """bf16 by bf16 in f32: `env["wide"]` has the rows of x (widened_rows.py), and a weight's pairs are taken apart in
    registers. Products are added in the order of k, as pairs of them are elsewhere."""

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
        ahead: Ahead,
    ) -> None:
        operand = env["wide"].of(row, count)

        def step(pair: Expr) -> None:
            both = [halves(self._weight(env["w"], weights + pair * PANEL + vector * LANES)) for vector in at]
            for half in range(2):
                columns = [T.bind(weight[half]) for weight in both]
                for i in range(count):
                    single = operand(i, begin + pair * 2 + half)
                    for j, column in enumerate(columns):
                        index = i * len(at) + j
                        totals[index] = fma(single, column, totals[index])

        in_blocks(length // 2, ahead, step)


@dataclass(frozen=True)
class Quantized(WeightFormat):
    """8- or 4-bit weights by 8-bit activations: integer sums of a group of k are exact, and scaled sums of groups are
    added in order. Weights on grids become bytes in registers, and are then those of 8 bits.

    Activations come quantized (rows/quantize.py): `x` [rows, padded k] in -127 .. 127, `xs` their scales, by row
    or by group, and `xsum` [rows, groups] the sums of a row's group. A stored weight is w / scale + zero, unsigned; so
    a group's sum starts at -zero * xsum and is multiplied by the weight's scale, and it or the total by the row's.
    """

    q: Quantization

    @property
    def element_bytes(self) -> int:
        return 1

    def args(self, k: int, rows_of: str) -> tuple[Arg, ...]:
        groups, padded = self.q.groups(k), self.q.padded(k)
        return (
            Arg("x", "i8", f"rows, {padded}"),
            Arg("xs", "f32", f"rows, {groups}" if self.q.rows_by_group else "rows"),
            Arg("xsum", "i32", f"rows, {groups}"),
            Arg("w", "u8", f"{rows_of}, {k} in {self.q}"),
        )

    def width(self, isa: Isa, rows: int) -> int:
        each = LANES // isa.register_lanes
        # the sums so far stay on the stack while a group is added up
        held = (1 if self.q.bits == 8 else 2) + (0 if isa.has_int8_dot else 2)
        if self.q.grid:
            held = 4 if isa.has_int8_dot else 3  # steps and bases, what was loaded, and a quad; or steps and two quads
        for width in (4, 2, 1):
            fits = each * (rows * width + width * held + 2) <= isa.vector_registers
            # measured: beyond half the registers the sums so far cost more than a larger tile saves
            if fits and (self.q.group == 0 or each * rows * width <= isa.vector_registers // 2):
                return width
        return 0

    def panel_bytes(self, k: int) -> int:
        return self.q.panel_bytes(k)

    def streams(self, isa: Isa) -> bool:
        return isa.has_int8_dot and self.q.bits == 8 and self.q.group == 0

    def tile(
        self, env: dict[str, Expr], k: int, row: Expr, count: int, panel: Expr, at: range, ahead: Ahead
    ) -> list[Expr]:
        groups, padded = self.q.groups(k), self.q.padded(k)
        base = T.bind(T.Cast("int64", panel) * self.q.panel_bytes(k))
        origin = T.bind(T.Cast("int64", row) * padded)
        sums = T.bind(T.Cast("int64", row) * groups)
        each = [(i, j) for i in range(count) for j in range(len(at))]
        if groups == 1:
            parts, scales = self._group(env, base, origin, sums, k, count, at, padded, ahead)
            totals = [part * scales[j] for (_, j), part in zip(each, parts, strict=True)]
        else:
            slots = Vectors(len(each))
            for index in range(len(each)):
                slots[index] = splat(0.0)
            with T.serial(0, groups) as group:
                ahead(group, groups)
                start = T.bind(base + T.Cast("int64", group) * self.q.group_bytes(k))
                row_at = T.bind(origin + T.Cast("int64", group) * self.q.group)
                parts, scales = self._group(env, start, row_at, sums + group, k, count, at, self.q.group, None)
                for index, ((i, j), part) in enumerate(zip(each, parts, strict=True)):
                    if self.q.rows_by_group:
                        part = part * splat(env["xs"][sums + group + i * groups])
                    slots[index] = fma(part, scales[j], slots[index])
            totals = [slots[index] for index in range(len(each))]
            if self.q.rows_by_group:
                return totals
        rows = [T.bind(splat(env["xs"][row + i])) for i in range(count)]
        return [total * rows[i] for (i, _), total in zip(each, totals, strict=True)]

    def _group(
        self,
        env: dict[str, Expr],
        start: Expr,
        x_at: Expr,
        sum_at: Expr,
        k: int,
        count: int,
        at: range,
        length: int,
        ahead: Ahead | None,
    ) -> tuple[list[Expr], list[Expr]]:
        """Sums over one group of `length` k, whose bytes begin at `start`, and the scales of its columns."""
        w, groups = env["w"], self.q.groups(k)
        totals = Vectors(count * len(at), "int32")
        for i in range(count):
            total = T.bind(env["xsum"][sum_at + i * groups])
            for j, vector in enumerate(at):
                totals[i * len(at) + j] = self._beginning(w, start, vector, total)
        self.multiply(env, totals, T.bind(start + self.q.header_bytes), x_at, k, count, at, length, ahead)
        scales = [T.bind(load(w, start + vector * LANES * self.q.scale_bytes, self.q.scale_dtype)) for vector in at]
        return [T.bind(T.Cast("float32x16", totals[i])) for i in range(count * len(at))], scales

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
        ahead: Ahead | None,
    ) -> None:
        """totals += the stored weights at byte `weights` times `count` rows of x from `x_at` on, over `length` k."""
        padded = self.q.padded(k)
        dot = "xllm_dot_u8i8" if self.q.multiplied.bits == 8 else "xllm_dot_u4i8"
        if "run_sums" in env:
            dot = "xllm_dot_u4i8_by"

        def add(quad: Expr, operands: list[Expr], steps: Sequence[Expr] = ()) -> None:
            for i in range(count):
                # rows at fixed distances from one address: one register for all of them
                four = T.call_extern("int32", "xllm_load_pair", address(env["x"], x_at + quad * QUAD + i * padded))
                operand = T.bind(T.broadcast(four, LANES))
                for j, weight in enumerate(operands):
                    index, by = i * len(at) + j, steps[j : j + 1]
                    totals[index] = T.call_pure_extern("int32x16", dot, totals[index], weight, operand, *by)

        def begin(run: Run, number: Expr) -> None:
            for j, vector in enumerate(at):
                base = T.bind(T.bitwise_and(run.bases(vector), T.broadcast(T.int32(255), LANES)))
                for i in range(count):
                    index, whole = i * len(at) + j, env["run_sums"][i * self.q.runs(k) + number]
                    totals[index] = totals[index] + base * T.broadcast(whole, LANES)

        def step(number: Expr) -> None:
            loaded = [self._load(env["w"], weights + number * _BYTE_STEP + vector * LANES * QUAD) for vector in at]
            if self.q.bits == 8:
                add(number, loaded)
                return
            low = T.broadcast(T.int32(0x0F0F0F0F), LANES)
            four = T.broadcast(T.int32(4), LANES)
            add(number * 2, [T.bind(T.bitwise_and(v, low)) for v in loaded])
            add(number * 2 + 1, [T.bind(T.bitwise_and(T.shift_right(v, four), low)) for v in loaded])

        if self.q.grid:
            if "run_sums" in env and at.start == 0:
                for i in range(count):
                    _sum_runs(self.q, k, env, x_at + i * padded, i * self.q.runs(k))
            self._by_runs(env, k, weights, at, begin, add, ahead)
            return
        steps = length // (QUAD if self.q.bits == 8 else 2 * QUAD)
        if ahead is None:
            with T.serial(0, steps) as number:
                step(number)
        else:
            in_blocks(steps, ahead, step)

    def _by_runs(
        self,
        env: dict[str, Expr],
        k: int,
        weights: Expr,
        at: range,
        begin: Callable[[Run, Expr], None],
        add: Callable[[Expr, list[Expr], list[Expr]], None],
        ahead: Ahead | None,
    ) -> None:
        """`add(quad, its bytes, [])` for all quads of a row, whose runs begin at byte `weights`.

        Where `env` has "run_sums", since what multiplies bytes is slow, `add(quad, its n, steps)`, which multiplies by
        the step where pairs of products are widened, and before each run `begin(run, its number)`, which adds the byte
        of n = 0 times the sum of a row's run: the same sums.
        """
        runs, by_numbers = self.q.runs(k), "run_sums" in env

        def one(number: Expr, valid: int) -> None:
            if ahead is not None:
                ahead(number, runs)
            run = Run(env["w"], T.bind(weights + T.Cast("int64", number) * self.q.run_bytes))
            steps = [run.steps(vector) for vector in at] if by_numbers else []
            quads = [partial(run.numbers, vector) if by_numbers else run.columns(vector) for vector in at]
            if by_numbers:
                begin(run, number)
            with T.serial(0, valid // (2 * QUAD)) as pair:
                both = [of(pair) for of in quads]
                first = T.bind(number * (self.q.grid // QUAD) + pair * 2)
                for half in range(2):
                    add(first + half, [quad[half] for quad in both], steps)

        each_run(self.q, self.q.padded(k), one)

    def _beginning(self, w: Expr, start: Expr, vector: int, total: Expr) -> Expr:
        """-zero * the row's sum."""
        if not self.q.zeros:
            return T.bind(T.broadcast(total * T.int32(-self.q.middle), LANES))
        where = start + PANEL * self.q.scale_bytes + vector * LANES
        zeros = T.call_extern("int32x16", "xllm_load_u8", address(w, where))
        return T.bind(zeros * T.broadcast(T.int32(0) - total, LANES))

    def _load(self, w: Expr, index: Expr) -> Expr:
        return T.bind(T.call_extern("int32x16", "xllm_load_i32", address(w, index)))


def _sum_runs(q: Quantization, k: int, env: dict[str, Expr], x_at: Expr, to: int) -> None:
    """The sums of the runs of the row of x that begins at `x_at`, to env["run_sums"] from `to` on."""

    def one(number: Expr, valid: int) -> None:
        starts = [x_at + number * q.grid + at for at in range(0, valid, STEP)]
        parts = [T.call_extern("int32", "xllm_sum_i8", address(env["x"], start)) for start in starts]
        T.buffer_store(env["run_sums"], sum(parts[1:], parts[0]), [to + number])

    each_run(q, q.padded(k), one)
