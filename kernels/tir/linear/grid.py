"""`GridFormat` by 8-bit activations: `Grids`. Weights become bytes in registers, and are multiplied as 8-bit ones."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from tvm.tirx.script.builder import ir as T

from xllm_compiler.kernels.tir.codegen.builder import Vectors, address, stack_array
from xllm_compiler.kernels.tir.isa.levels import LANES, Isa
from xllm_compiler.kernels.tir.linear.amx import AmxGrids
from xllm_compiler.kernels.tir.linear.blocks import BlockSums
from xllm_compiler.kernels.tir.linear.grid_bytes import Run, each_run
from xllm_compiler.kernels.tir.linear.integer import IntegerRows, Integers, quad_adder
from xllm_compiler.kernels.tir.linear.l1_slices import SlicedGrids
from xllm_compiler.kernels.tir.linear.reader import Prefetch, Site
from xllm_compiler.weight_formats import QUAD, STEP, GridFormat

Expr = Any


@dataclass(frozen=True)
class Grids(IntegerRows):
    """4-bit numbers on grids of bytes.

    Where bytes are slow to multiply, x is multiplied by the 4-bit numbers. The instruction that widens pairs of
    products then multiplies them by the step. Before each run, the byte of n = 0 times the sum of x over the run is
    added; so the sums are the same. env["run_sums"] has the sums of runs.
    """

    format: GridFormat

    def held(self, isa: Isa) -> int:
        return 4 if isa.has_int8_dot else 3  # steps and bases, what was loaded, and a quad; or steps and two quads

    def scratch(self, isa: Isa, k: int, height: int) -> dict[str, Expr]:
        return {} if isa.has_int8_dot else {"run_sums": stack_array(height * self.format.runs(k), "int32")}

    def blocks(self, site: Site) -> BlockSums | None:
        format, isa = self.format, site.isa
        if isa.has_amx:
            return AmxGrids(format, site.k, site.env) if AmxGrids.can(format, site.k) else None
        if not isa.has_int8_dot:  # unpacking to bytes would not pay
            return None
        by_bytes, fewest = Integers(format.as_bytes), self.height(isa, site.most_rows) + 1
        height = by_bytes.height(isa, site.most_rows)
        return SlicedGrids(format, by_bytes, isa, site.k, height, fewest, site.env, site.prefetch)

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
        padded, by_numbers = self.format.padded(k), "run_sums" in env
        dot = "xllm_dot_u4i8_by" if by_numbers else "xllm_dot_u8i8"
        add, runs = quad_adder(dot, env, totals, x_at, padded, count, at), self.format.runs(k)

        def begin(run: Run, number: Expr) -> None:
            for j, vector in enumerate(at):
                base = T.bind(T.bitwise_and(run.bases(vector), T.broadcast(T.int32(255), LANES)))
                for i in range(count):
                    index, whole = i * len(at) + j, env["run_sums"][i * runs + number]
                    totals[index] = totals[index] + base * T.broadcast(whole, LANES)

        def one(number: Expr, valid: int) -> None:
            if prefetch is not None:
                prefetch(number, runs)
            run = Run(env["w"], T.bind(weights + T.Cast("int64", number) * self.format.run_bytes))
            steps = [run.steps(vector) for vector in at] if by_numbers else []
            quads = [partial(run.numbers, vector) if by_numbers else run.columns(vector) for vector in at]
            if by_numbers:
                begin(run, number)
            with T.serial(0, valid // (2 * QUAD)) as pair:
                both = [of(pair) for of in quads]
                first = T.bind(number * (self.format.grid // QUAD) + pair * 2)
                for half in range(2):
                    add(first + half, [quad[half] for quad in both], steps)

        if by_numbers and at.start == 0:
            for i in range(count):
                self._sum_runs(k, env, x_at + i * padded, i * runs)
        each_run(self.format, padded, one)

    def _sum_runs(self, k: int, env: dict[str, Expr], x_at: Expr, to: int) -> None:
        """Emits: writes the sums of the runs of the row of x that begins at `x_at` to env["run_sums"], from `to` on."""

        def one(number: Expr, valid: int) -> None:
            starts = [x_at + number * self.format.grid + at for at in range(0, valid, STEP)]
            parts = [T.call_extern("int32", "xllm_sum_i8", address(env["x"], start)) for start in starts]
            T.buffer_store(env["run_sums"], sum(parts[1:], parts[0]), [to + number])

        each_run(self.format, self.format.padded(k), one)
