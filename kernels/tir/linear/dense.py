"""Weights in the type of the activations: `Dense` and `Widened`, with their inner loops over k."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from tvm.tirx.script.builder import ir as T

from xllm_compiler.kernels.tir.codegen.builder import (
    Vectors,
    address,
    fma,
    halves,
    load,
    splat,
    tile_rows,
    tile_width,
)
from xllm_compiler.kernels.tir.codegen.kernel import Arg
from xllm_compiler.kernels.tir.isa.levels import LANES, Isa
from xllm_compiler.kernels.tir.linear.amx import AmxDense
from xllm_compiler.kernels.tir.linear.blocks import BlockSums
from xllm_compiler.kernels.tir.linear.l1_slices import WIDEN_ROWS, SlicedFloats, SlicedPairs
from xllm_compiler.kernels.tir.linear.reader import Prefetch, Site, WeightReader, in_blocks
from xllm_compiler.kernels.tir.linear.widened_rows import WideRows
from xllm_compiler.weight_formats import PANEL

Expr = Any


@dataclass(frozen=True)
class Dense(WeightReader):
    """The weight has the type of x: f32, or bf16 in pairs along k. Each element has one f32 accumulator, and k is added
    in order."""

    dtype: str

    def args(self, k: int, rows_of: str) -> tuple[Arg, ...]:
        return (Arg("x", self.dtype, f"rows, {k}"), Arg("w", self.dtype, f"{rows_of}, {k}"))

    def at(self, isa: Isa, k: int) -> WeightReader:
        return Widened(self.dtype) if self.widens(isa, k) else self

    def width(self, isa: Isa, rows: int) -> int:
        return tile_width(isa, self.dtype, rows)

    def streams(self, isa: Isa) -> bool:
        return True

    def widens(self, isa: Isa, k: int) -> bool:
        return k % 2 == 0 and WideRows.can(isa, self.dtype, k)

    def blocks(self, site: Site) -> BlockSums | None:
        if self.dtype != "bf16" or site.k % 2:
            return None
        if site.isa.has_amx:
            return AmxDense(site.k, site.env)
        if site.isa.has_bf16_dot:
            return self._few(site, 2 * self.height(site.isa, site.most_rows))
        return self._as_floats(site, None)

    def _few(self, site: Site, greatest: int) -> SlicedPairs:
        height = self.height(site.isa, site.most_rows)
        return SlicedPairs(self, site.isa, site.k, height, greatest, site.env, site.prefetch)

    def _as_floats(self, site: Site, few: SlicedPairs | None) -> SlicedFloats:
        width = partial(Dense("f32").width, site.isa)
        return SlicedFloats(site.k, tile_rows(width, site.most_rows), width, site.env, site.prefetch, few)

    def panel_bytes(self, k: int) -> int:
        return 4 * PANEL * (k if self.dtype == "f32" else -(-k // 2))

    def tile(
        self, env: dict[str, Expr], k: int, row: Expr, count: int, panel: Expr, at: range, prefetch: Prefetch
    ) -> list[Expr]:
        totals = Vectors(count * len(at))
        for index in range(count * len(at)):
            totals[index] = splat(0.0)
        weights = self.begins(k, panel)
        self.multiply(env, totals, weights, k, row, T.int32(0), count, at, k, prefetch)
        if self.dtype == "bf16" and k % 2:
            # k is odd: the last element's partner in the pair must be zero, not the next row's first element
            last = T.bind(T.Cast("int64", row) * k + (k - 1))
            single = [T.Cast("int32", env["x"][last + i * k]) for i in range(count)]
            operands = [T.bind(T.broadcast(value, LANES)) for value in single]
            self._add(env, totals, weights + k // 2 * PANEL, at, operands)
        return [totals[index] for index in range(count * len(at))]

    def begins(self, k: int, panel: Expr) -> Expr:
        """The index at which a panel begins, in f32 or in pairs of bf16."""
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
        prefetch: Prefetch,
    ) -> None:
        """Emits totals += `count` rows by the weights from index `weights` on, over `length` values of k from `begin`
        on. bf16 is multiplied in pairs along k."""
        origin = T.bind(T.Cast("int64", row) * k + begin)

        def step(number: Expr) -> None:
            operands = [self._operand(env["x"], origin + i * k, number) for i in range(count)]
            self._add(env, totals, weights + number * PANEL, at, operands)

        in_blocks(length if self.dtype == "f32" else length // 2, prefetch, step)

    def _add(self, env: dict[str, Expr], totals: Vectors, weights: Expr, at: range, operands: list[Expr]) -> None:
        """Emits totals += the products of one step."""
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
    """bf16 by bf16 in f32, where no instruction multiplies bf16. `env["wide"]` has the rows of x (widened_rows.py), and
    the pairs of the weight are unpacked in registers. Products are added in the order of k."""

    def at(self, isa: Isa, k: int) -> WeightReader:
        return self

    def blocks(self, site: Site) -> BlockSums | None:
        few = self.height(site.isa, site.most_rows) < WIDEN_ROWS - 1
        return self._as_floats(site, self._few(site, WIDEN_ROWS - 1) if few else None)

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
        prefetch: Prefetch,
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

        in_blocks(length // 2, prefetch, step)
