"""Quantized weights by float activations: `WeightOnly`, the third weight format. Owns its inner loops over k.

A stored integer less its zero point is exact in bf16 and f32, so weights are widened in registers and multiplied as
those of `Dense` are: one f32 sum over each group of k in order (pairs of k for bf16), and the groups' sums, each times
its scale, added in order. Nothing is rounded that the dequantized matrix would not round as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from xllm_compiler.kernels.layouts import QUAD, Quantization
from xllm_compiler.kernels.tir.codegen.builder import Vectors, address, fma, halves, load, splat
from xllm_compiler.kernels.tir.codegen.kernel import PANEL, Arg
from xllm_compiler.kernels.tir.isa.levels import LANES, Isa
from xllm_compiler.kernels.tir.linear.formats import Ahead, WeightFormat, in_blocks
from xllm_compiler.kernels.tir.linear.grid_bytes import Run
from xllm_compiler.kernels.tir.linear.widened_rows import WideRows

Expr = Any
_STEP_BYTES = PANEL * QUAD
_LARGE = 1 << 23  # f32 at and above it are whole numbers: the bits of 2^23 + n are those of 2^23 plus n


@dataclass(frozen=True)
class WeightOnly(WeightFormat):
    """8- or 4-bit weights by activations in `dtype`, bf16 or f32."""

    dtype: str
    q: Quantization

    @property
    def element_bytes(self) -> int:
        return 1

    def args(self, k: int, rows_of: str) -> tuple[Arg, ...]:
        return (Arg("x", self.dtype, f"rows, {k}"), Arg("w", "u8", f"{rows_of}, {k} in {self.q}"))

    def panel_bytes(self, k: int) -> int:
        return self.q.panel_bytes(k)

    def widens(self, isa: Isa, k: int) -> bool:
        return WideRows.can(isa, self.dtype, k)

    def width(self, isa: Isa, rows: int) -> int:
        each = LANES // isa.register_lanes
        for width in (4, 2, 1):  # beside the sums: what was loaded, its zero points, and two values of each
            if each * (rows * width + 3 * width + 2) <= isa.vector_registers:
                return width
        return 0

    def tile(
        self, env: dict[str, Expr], k: int, row: Expr, count: int, panel: Expr, at: range, ahead: Ahead
    ) -> list[Expr]:
        length = self.q.group or self.q.padded(k)
        base = T.bind(T.Cast("int64", panel) * self.q.panel_bytes(k))
        rows = _Rows(env, self.dtype, row, k, count)
        totals = rows.sums(at)

        def group(number: Expr, valid: int, ahead: Ahead | None) -> None:
            start = T.bind(base + T.Cast("int64", number) * self.q.group_bytes(k))
            begin = T.bind(number * length)
            if "opened" in env:
                parts = self._opened_group(env, T.bind(number * (length // 2)), rows, begin, at, valid)
            else:
                parts = self._group(env, start, rows, begin, at, valid, ahead)
            scales = [self._header(env["w"], start, vector) for vector in at]
            for index, part in enumerate(parts):
                totals[index] = fma(part, scales[index % len(at)], totals[index])

        whole, rest = divmod(k, length)
        if self.q.group == 0:
            group(T.int32(0), k, ahead)
            return [totals[index] for index in range(count * len(at))]
        if whole:
            with T.serial(0, whole) as number:
                ahead(number, whole)
                group(number, length, None)
        if rest:
            group(T.int32(whole), rest, None)
        return [totals[index] for index in range(count * len(at))]

    def opened_bytes(self, k: int) -> int:
        return 2 * PANEL * self.q.padded(k) if self.dtype == "bf16" else 0

    def open(self, env: dict[str, Expr], k: int, panel: Expr) -> None:
        """Values less their zero points, in pairs of bf16 along k."""
        base = T.bind(T.Cast("int64", panel) * self.q.panel_bytes(k))
        length = self.q.group or self.q.padded(k)
        with T.serial(0, self.q.groups(k)) as group:
            start = T.bind(base + T.Cast("int64", group) * self.q.group_bytes(k))
            to = T.bind(group * (2 * PANEL * length))
            open_group(self.q, env["w"], start, length, env["opened"], to)

    def _opened_group(
        self, env: dict[str, Expr], pairs_at: Expr, rows: _Rows, begin: Expr, at: range, valid: int
    ) -> list[Expr]:
        """`_group` of an opened panel, whose pairs of the group begin with number `pairs_at`."""
        parts = rows.sums(at)

        def add(pair: Expr, size: int) -> None:
            where = [((pairs_at + pair) * PANEL + vector * LANES) * 4 for vector in at]
            weights = [T.bind(T.call_extern("int32x16", "xllm_load_i32", address(env["opened"], w))) for w in where]
            if rows.in_pairs:
                rows.add_pairs(parts, T.bind(begin + pair * 2), weights, size)
            else:
                rows.add(parts, T.bind(begin + pair * 2), [list(halves(weight))[:size] for weight in weights])

        if valid >= 2:
            with T.serial(0, valid // 2) as pair:
                add(pair, 2)
        if valid % 2:
            add(T.int32(valid // 2), 1)
        return [parts[index] for index in range(rows.count * len(at))]

    def _header(self, w: Expr, start: Expr, vector: int) -> Expr:
        return T.bind(load(w, start + vector * LANES * self.q.scale_bytes, self.q.scale_dtype))

    def _group(
        self, env: dict[str, Expr], start: Expr, rows: _Rows, begin: Expr, at: range, valid: int, ahead: Any
    ) -> list[Expr]:
        """Sums over the first `valid` values of a group, not scaled; x has nothing beyond them that may be read."""
        parts, stored, each = rows.sums(at), _Stored(self.q, env["w"], start, at), QUAD * 8 // self.q.bits

        def step(number: Expr, here: int) -> None:
            value = stored.step(number)
            for first in range(0, here, 2):
                pair = min(2, here - first)
                wide = [[value(j, first + i) for i in range(pair)] for j in range(len(at))]
                element = T.bind(begin + number * each + first)
                if rows.in_pairs:
                    rows.add_pairs(parts, element, [as_pair(values) for values in wide], pair)
                else:
                    rows.add(parts, element, wide)

        steps, rest = divmod(valid, each)
        if steps and ahead is not None:
            in_blocks(steps, ahead, lambda number: step(number, each))
        elif steps:
            with T.serial(0, steps) as number:
                step(number, each)
        if rest:
            step(T.int32(steps), rest)
        return [parts[index] for index in range(rows.count * len(at))]


class _Rows:
    """`count` rows of x from row `row` on, which are multiplied one element of k at a time, or in pairs of bf16."""

    def __init__(self, env: dict[str, Expr], dtype: str, row: Expr, k: int, count: int) -> None:
        self._x, self._k, self.count = env["x"], k, count
        self._origin = T.bind(T.Cast("int64", row) * k)
        self._wide = env["wide"].of(row, count) if "wide" in env else None
        self.in_pairs = dtype == "bf16" and self._wide is None

    def sums(self, at: range) -> Vectors:
        """Zero for each row and vector, row by row."""
        parts = Vectors(self.count * len(at))
        for index in range(self.count * len(at)):
            parts[index] = splat(0.0)
        return parts

    def add(self, parts: Vectors, element: Expr, weights: list[list[Expr]]) -> None:
        """parts += x[:, element + p] * weights[j][p] for each vector j and then p."""
        for i in range(self.count):
            for p in range(len(weights[0])):
                if self._wide:
                    single = self._wide(i, element + p)
                else:
                    single = T.bind(splat(self._x[self._origin + element + p + i * self._k]))
                for j, weight in enumerate(weights):
                    index = i * len(weights) + j
                    parts[index] = fma(single, weight[p], parts[index])

    def add_pairs(self, parts: Vectors, element: Expr, weights: list[Expr], size: int) -> None:
        """The same for `size` elements, 1 or 2, of weights in pairs."""
        for i in range(self.count):
            at = self._origin + element + i * self._k
            if size == 2:
                both = T.call_extern("int32", "xllm_load_pair", address(self._x, at))
            else:
                both = T.Cast("int32", self._x[at])
            operand = T.bind(T.broadcast(both, LANES))
            for j, weight in enumerate(weights):
                index = i * len(weights) + j
                parts[index] = T.call_pure_extern("float32x16", "xllm_dot_bf16", parts[index], operand, weight)


def open_group(q: Quantization, w: Expr, start: Expr, length: int, to: Expr, at: Expr) -> None:
    """Writes the `length` values of the group of a panel that begins at byte `start` of `w`, less their zero points, as
    pairs of bf16 along k for each of the 64 columns, to `to` from byte `at` on."""
    vectors, elements = range(PANEL // LANES), QUAD * 8 // q.bits
    stored = _Stored(q, w, start, vectors)
    with T.serial(0, length // elements) as step:
        value = stored.step(step)
        for vector in vectors:
            for first in range(0, elements, 2):
                pair = as_pair([value(vector, first + i) for i in range(2)])
                place = at + step * (elements * 2 * PANEL) + (first // 2 * _STEP_BYTES + vector * LANES * QUAD)
                T.evaluate(T.call_extern("int32", "xllm_store_i32", address(to, place), pair))


class _Stored:
    """The values of the group at byte `start`, of the columns of the vectors `at`."""

    def __init__(self, q: Quantization, w: Expr, start: Expr, at: range) -> None:
        self._q, self._w, self._at = q, w, at
        self._values = T.bind(start + q.header_bytes)
        self._points = [zero_point(q, w, start, vector) for vector in at]

    def step(self, number: Expr) -> Callable[[int, int], Expr]:
        """`value(j, element)`: of the j-th vector, an element of the 4 or 8 of step `number`, less its zero point."""
        q, w = self._q, self._w
        if q.grid:
            steps = q.grid // (2 * QUAD)
            run = T.truncdiv(number, T.int32(steps))
            opened = Run(w, T.bind(self._values + T.Cast("int64", run) * q.run_bytes))
            quads = [opened.columns(vector)(number - run * steps) for vector in self._at]
            return lambda j, element: widened(q.multiplied, quads[j][element // QUAD], element % QUAD, self._points[j])
        where = self._values + number * _STEP_BYTES
        loaded = [
            T.bind(T.call_extern("int32x16", "xllm_load_i32", address(w, where + vector * LANES * QUAD)))
            for vector in self._at
        ]
        return lambda j, element: widened(q, loaded[j], element, self._points[j])


def zero_point(q: Quantization, w: Expr, start: Expr, vector: int) -> Expr:
    """2^23 plus the zero points of 16 columns of the group at byte `start`, as f32."""
    if not q.zeros:
        return T.bind(splat(float(_LARGE + q.middle)))
    where = start + PANEL * q.scale_bytes + vector * LANES
    zeros = T.call_extern("int32x16", "xllm_load_u8", address(w, where))
    return T.bind(T.Cast("float32x16", zeros) + splat(float(_LARGE)))


def widened(q: Quantization, loaded: Expr, element: int, point: Expr) -> Expr:
    """Value `element` of each lane's quad, or pair of quads, less its zero point, as f32."""
    shift = 8 * (element % QUAD) + 4 * (element // QUAD)
    bits = T.shift_right(loaded, T.broadcast(T.int32(shift), LANES)) if shift else loaded
    stored = T.bitwise_and(bits, T.broadcast(T.int32((1 << q.bits) - 1), LANES))
    large = T.bitwise_or(stored, T.broadcast(T.int32(0x4B000000), LANES))
    return T.bind(T.reinterpret("float32x16", large) - point)


def as_pair(values: list[Expr]) -> Expr:
    """One or two f32 that bf16 holds exactly, as a pair of bf16: their upper halves, the first one below."""
    bits = [T.reinterpret("int32x16", value) for value in values]
    low = T.bitwise_and(T.shift_right(bits[0], T.broadcast(T.int32(16), LANES)), T.broadcast(T.int32(0xFFFF), LANES))
    return T.bind(low if len(bits) == 1 else T.bitwise_or(low, bits[1]))
