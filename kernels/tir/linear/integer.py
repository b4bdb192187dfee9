"""Integer weights by 8-bit activations: `IntegerRows`, and `Integers` for `IntegerFormat`.

Activations come quantized (rows/quantize.py). `x` [rows, padded k] is in -127 .. 127, `xs` has its scales, by row or by
group, and `xsum` [rows, groups] the sums of x over each group. A stored weight is w / scale + zero, unsigned. So a
group's sum starts at -zero * xsum, and is multiplied by the scales of the weight and of the row.

The integer sum of a group is exact. The scaled sums of groups are added in order.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from xllm_compiler.kernels.tir.codegen.builder import Vectors, address, fma, load, splat
from xllm_compiler.kernels.tir.codegen.kernel import Arg
from xllm_compiler.kernels.tir.isa.levels import LANES, Isa
from xllm_compiler.kernels.tir.linear.amx import AmxBytes
from xllm_compiler.kernels.tir.linear.amx_grouped import AmxRoundedRows
from xllm_compiler.kernels.tir.linear.blocks import BlockSums
from xllm_compiler.kernels.tir.linear.l1_slices import SlicedBytes
from xllm_compiler.kernels.tir.linear.reader import Prefetch, Site, WeightReader, in_blocks
from xllm_compiler.weight_formats import PANEL, QUAD, IntegerFormat, RowFormat, WeightFormat

Expr = Any
AddQuad = Callable[[Expr, Sequence[Expr], Sequence[Expr]], None]
"""`add(quad, weights, steps)` emits totals += rows of x at a quad of k times the four weights in each lane, for each
vector. `steps` are the third operand of the product, or empty."""
_BYTE_STEP = PANEL * QUAD  # bytes of one load step of a quantized panel


class IntegerRows(WeightReader):
    """What all formats share whose integers are multiplied by integer activations."""

    int8_dots = True
    format: WeightFormat

    @property
    def rows(self) -> RowFormat:
        rows = self.format.rows
        assert rows is not None, f"{self.format} is multiplied by no 8-bit rows"
        return rows

    def args(self, k: int, rows_of: str) -> tuple[Arg, ...]:
        groups, padded = self.format.groups(k), self.format.padded(k)
        return (
            Arg("x", "i8", f"rows, {padded}"),
            Arg("xs", "f32", f"rows, {groups}" if self.rows.by_group else "rows"),
            Arg("xsum", "i32", f"rows, {groups}"),
            Arg("w", "u8", f"{rows_of}, {k} in {self.format}"),
        )

    def width(self, isa: Isa, rows: int) -> int:
        each, held = LANES // isa.register_lanes, self.held(isa)
        for width in (4, 2, 1):
            fits = each * (rows * width + width * held + 2) <= isa.vector_registers
            # measured: beyond half the registers the sums so far cost more than a larger tile saves
            if fits and (self.format.group == 0 or each * rows * width <= isa.vector_registers // 2):
                return width
        return 0

    @abstractmethod
    def held(self, isa: Isa) -> int:
        """How many registers each vector of weights takes beside the group's sums. The sums of earlier groups stay on
        the stack meanwhile."""

    def panel_bytes(self, k: int) -> int:
        return self.format.panel_bytes(k)

    def tile(
        self, env: dict[str, Expr], k: int, row: Expr, count: int, panel: Expr, at: range, prefetch: Prefetch
    ) -> list[Expr]:
        groups, padded, by_group = self.format.groups(k), self.format.padded(k), self.rows.by_group
        base = T.bind(T.Cast("int64", panel) * self.format.panel_bytes(k))
        origin = T.bind(T.Cast("int64", row) * padded)
        sums = T.bind(T.Cast("int64", row) * groups)
        each = [(i, j) for i in range(count) for j in range(len(at))]
        if groups == 1:
            parts, scales = self._group(env, base, origin, sums, k, count, at, padded, prefetch)
            totals = [part * scales[j] for (_, j), part in zip(each, parts, strict=True)]
        else:
            slots = Vectors(len(each))
            for index in range(len(each)):
                slots[index] = splat(0.0)
            with T.serial(0, groups) as group:
                prefetch(group, groups)
                start = T.bind(base + T.Cast("int64", group) * self.format.group_bytes(k))
                row_at = T.bind(origin + T.Cast("int64", group) * self.format.group)
                parts, scales = self._group(env, start, row_at, sums + group, k, count, at, self.format.group, None)
                for index, ((i, j), part) in enumerate(zip(each, parts, strict=True)):
                    if by_group:
                        part = part * splat(env["xs"][sums + group + i * groups])
                    slots[index] = fma(part, scales[j], slots[index])
            totals = [slots[index] for index in range(len(each))]
            if by_group:
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
        prefetch: Prefetch | None,
    ) -> tuple[list[Expr], list[Expr]]:
        """The sums over one group of `length` values of k, whose bytes begin at `start`, and its columns' scales."""
        w, groups = env["w"], self.format.groups(k)
        totals = Vectors(count * len(at), "int32")
        for i in range(count):
            total = T.bind(env["xsum"][sum_at + i * groups])
            for j, vector in enumerate(at):
                totals[i * len(at) + j] = self._beginning(w, start, vector, total)
        self.multiply(env, totals, T.bind(start + self.format.header_bytes), x_at, k, count, at, length, prefetch)
        scales = [
            T.bind(load(w, start + vector * LANES * self.format.scale_bytes, self.format.scale_dtype)) for vector in at
        ]
        return [T.bind(T.Cast("float32x16", totals[i])) for i in range(count * len(at))], scales

    @abstractmethod
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
        prefetch: Prefetch | None,
    ) -> None:
        """Emits totals += `count` rows of x from `x_at` on times the stored weights at byte `weights`, over `length`
        values of k."""

    def _beginning(self, w: Expr, start: Expr, vector: int, total: Expr) -> Expr:
        """What a column's sum starts at: -zero * the sum of the row's group."""
        if not self.format.zeros:
            return T.bind(T.broadcast(total * T.int32(-self.format.zero), LANES))
        where = start + PANEL * self.format.scale_bytes + vector * LANES
        zeros = T.call_extern("int32x16", "xllm_load_u8", address(w, where))
        return T.bind(zeros * T.broadcast(T.int32(0) - total, LANES))


def quad_adder(
    dot: str, env: dict[str, Expr], totals: Vectors, x_at: Expr, padded: int, count: int, at: range
) -> AddQuad:
    """An `AddQuad` that multiplies with the intrinsic `dot`: `count` rows of `padded` values each, from `x_at` on, by
    the weights of the vectors `at`."""

    def add(quad: Expr, weights: Sequence[Expr], steps: Sequence[Expr]) -> None:
        for i in range(count):
            # rows lie at constant distances, so that one address register serves all of them
            four = T.call_extern("int32", "xllm_load_pair", address(env["x"], x_at + quad * QUAD + i * padded))
            operand = T.bind(T.broadcast(four, LANES))
            for j, weight in enumerate(weights):
                index, by = i * len(at) + j, steps[j : j + 1]
                totals[index] = T.call_pure_extern("int32x16", dot, totals[index], weight, operand, *by)

    return add


@dataclass(frozen=True)
class Integers(IntegerRows):
    """8- or 4-bit integers."""

    format: IntegerFormat

    def held(self, isa: Isa) -> int:
        return (1 if self.format.bits == 8 else 2) + (0 if isa.has_int8_dot else 2)

    def streams(self, isa: Isa) -> bool:
        return isa.has_int8_dot and self.format.bits == 8 and self.format.group == 0

    def blocks(self, site: Site) -> BlockSums | None:
        format, isa = self.format, site.isa
        if isa.has_amx:
            if format.bits == 8 and format.group == 0:
                return AmxBytes(format, site.k, site.env)
            return AmxRoundedRows(format, site.k, site.env) if AmxRoundedRows.can(format, site.k) else None
        if format.bits == 4 or format.group or not SlicedBytes.pays(format, isa, site.k):
            return None
        height = self.height(isa, site.most_rows)
        return SlicedBytes(format, self, isa, site.k, height, height + 1, site.env, site.prefetch)

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
        prefetch: Prefetch | None,
    ) -> None:
        dot = "xllm_dot_u8i8" if self.format.bits == 8 else "xllm_dot_u4i8"
        add = quad_adder(dot, env, totals, x_at, self.format.padded(k), count, at)

        def step(number: Expr) -> None:
            places = [weights + number * _BYTE_STEP + vector * LANES * QUAD for vector in at]
            loaded = [T.bind(T.call_extern("int32x16", "xllm_load_i32", address(env["w"], where))) for where in places]
            if self.format.bits == 8:
                add(number, loaded, ())
                return
            low = T.broadcast(T.int32(0x0F0F0F0F), LANES)
            four = T.broadcast(T.int32(4), LANES)
            add(number * 2, [T.bind(T.bitwise_and(v, low)) for v in loaded], ())
            add(number * 2 + 1, [T.bind(T.bitwise_and(T.shift_right(v, four), low)) for v in loaded], ())

        steps = length // (QUAD if self.format.bits == 8 else 2 * QUAD)
        if prefetch is None:
            with T.serial(0, steps) as number:
                step(number)
        else:
            in_blocks(steps, prefetch, step)
