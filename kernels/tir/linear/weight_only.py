"""Quantized weights by float activations: `WeightOnly`, for every weight format.

A stored value less its zero point is exact in bf16 and f32. So weights are widened in registers (stored_values.py) and
multiplied as in `Dense`: one f32 sum over each group of k, in order (pairs of k for bf16). Each group's sum is
multiplied by its scale, and these products are added in order. Only what the dequantized matrix would round is rounded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from xllm_compiler.kernels.tir.codegen.builder import Vectors, address, fma, halves, load, splat
from xllm_compiler.kernels.tir.codegen.kernel import Arg
from xllm_compiler.kernels.tir.isa.levels import LANES, Isa
from xllm_compiler.kernels.tir.linear.amx_grouped import AmxFloatRows
from xllm_compiler.kernels.tir.linear.blocks import BlockSums
from xllm_compiler.kernels.tir.linear.reader import Prefetch, Site, WeightReader, in_blocks
from xllm_compiler.kernels.tir.linear.stored_values import as_pair, stored_values, unpack_group
from xllm_compiler.kernels.tir.linear.widened_rows import WideRows
from xllm_compiler.weight_formats import PANEL, WeightFormat

Expr = Any


@dataclass(frozen=True)
class WeightOnly(WeightReader):
    """Weights in a format by activations in `dtype`, bf16 or f32."""

    dtype: str
    format: WeightFormat

    def args(self, k: int, rows_of: str) -> tuple[Arg, ...]:
        return (Arg("x", self.dtype, f"rows, {k}"), Arg("w", "u8", f"{rows_of}, {k} in {self.format}"))

    def panel_bytes(self, k: int) -> int:
        return self.format.panel_bytes(k)

    def widens(self, isa: Isa, k: int) -> bool:
        return WideRows.can(isa, self.dtype, k)

    def width(self, isa: Isa, rows: int) -> int:
        each = LANES // isa.register_lanes
        for width in (4, 2, 1):  # each vector needs, beside the sums, what was loaded, zero points, and two values
            if each * (rows * width + 3 * width + 2) <= isa.vector_registers:
                return width
        return 0

    def tile(
        self, env: dict[str, Expr], k: int, row: Expr, count: int, panel: Expr, at: range, prefetch: Prefetch
    ) -> list[Expr]:
        length = self.format.group or self.format.padded(k)
        base = T.bind(T.Cast("int64", panel) * self.format.panel_bytes(k))
        rows = _Rows(env, self.dtype, row, k, count)
        totals = rows.sums(at)

        def group(number: Expr, valid: int, prefetch: Prefetch | None) -> None:
            start = T.bind(base + T.Cast("int64", number) * self.format.group_bytes(k))
            begin = T.bind(number * length)
            if "unpacked" in env:
                parts = self._unpacked_group(env, T.bind(number * (length // 2)), rows, begin, at, valid)
            else:
                parts = self._group(env, start, rows, begin, at, valid, prefetch)
            scales = [self._header(env["w"], start, vector) for vector in at]
            for index, part in enumerate(parts):
                totals[index] = fma(part, scales[index % len(at)], totals[index])

        whole, rest = divmod(k, length)
        if self.format.group == 0:
            group(T.int32(0), k, prefetch)
            return [totals[index] for index in range(count * len(at))]
        if whole:
            with T.serial(0, whole) as number:
                prefetch(number, whole)
                group(number, length, None)
        if rest:
            group(T.int32(whole), rest, None)
        return [totals[index] for index in range(count * len(at))]

    def blocks(self, site: Site) -> BlockSums | None:
        if site.isa.has_amx and self.dtype == "bf16" and AmxFloatRows.can(self.format, site.k):
            return AmxFloatRows(self.format, site.k, site.env)
        return None

    def unpacked_bytes(self, k: int) -> int:
        return 2 * PANEL * self.format.padded(k) if self.dtype == "bf16" else 0

    def unpack(self, env: dict[str, Expr], k: int, panel: Expr) -> None:
        """Emits: unpacks a panel to values less their zero points, in pairs of bf16 along k."""
        base = T.bind(T.Cast("int64", panel) * self.format.panel_bytes(k))
        length = self.format.group or self.format.padded(k)
        with T.serial(0, self.format.groups(k)) as group:
            start = T.bind(base + T.Cast("int64", group) * self.format.group_bytes(k))
            to = T.bind(group * (2 * PANEL * length))
            unpack_group(self.format, env["w"], start, length, env["unpacked"], to)

    def _unpacked_group(
        self, env: dict[str, Expr], pairs_at: Expr, rows: _Rows, begin: Expr, at: range, valid: int
    ) -> list[Expr]:
        """`_group` for an unpacked panel. The pairs of the group begin at index `pairs_at`."""
        parts = rows.sums(at)

        def add(pair: Expr, size: int) -> None:
            where = [((pairs_at + pair) * PANEL + vector * LANES) * 4 for vector in at]
            weights = [T.bind(T.call_extern("int32x16", "xllm_load_i32", address(env["unpacked"], w))) for w in where]
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
        return T.bind(load(w, start + vector * LANES * self.format.scale_bytes, self.format.scale_dtype))

    def _group(
        self, env: dict[str, Expr], start: Expr, rows: _Rows, begin: Expr, at: range, valid: int, prefetch: Any
    ) -> list[Expr]:
        """Sums over the first `valid` values of a group, not scaled. x must not be read beyond them."""
        parts, stored = rows.sums(at), stored_values(self.format, env["w"], start, at)
        each = stored.elements

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
        if steps and prefetch is not None:
            in_blocks(steps, prefetch, lambda number: step(number, each))
        elif steps:
            with T.serial(0, steps) as number:
                step(number, each)
        if rest:
            step(T.int32(steps), rest)
        return [parts[index] for index in range(rows.count * len(at))]


class _Rows:
    """`count` rows of x from row `row` on. They are multiplied one element of k at a time, or in pairs of bf16."""

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
        """Emits parts += x[:, element + p] * weights[j][p] for each vector j, p in order."""
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
        """Emits the same for `size` elements, 1 or 2, of weights in pairs."""
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
