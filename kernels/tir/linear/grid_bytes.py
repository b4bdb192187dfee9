"""Unpacks weights of `GridFormat` to the bytes that they stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.tirx.script.builder import ir as T

from xllm_compiler.kernels.tir.codegen.builder import address
from xllm_compiler.kernels.tir.isa.levels import LANES
from xllm_compiler.weight_formats import PANEL, QUAD, STEP, GridFormat

Expr = Any
Quads = tuple[Expr, Expr]
"""The bytes of 16 columns at two quads of k that follow each other."""
_BOTH = PANEL * QUAD  # bytes that hold two quads of each column of a panel


class Run:
    """A run of `q.grid` values of each column of a panel. The constructor loads its steps and points."""

    def __init__(self, w: Expr, start: Expr) -> None:
        """`start`: the byte of `w` at which the run begins."""
        self._w, self._start = w, start
        heads = T.bind(T.call_extern("int32x16", "xllm_load_i32", address(w, start)))
        self._steps, self._bases = (
            T.bind(T.call_pure_extern("int32x16", f"xllm_grid_{name}", heads)) for name in ("steps", "bases")
        )

    def columns(self, vector: int) -> Callable[[Expr | int], Quads]:
        """For 16 columns, a function of n that gives their bytes at quads 2 * n and 2 * n + 1 of the run."""
        steps, bases = self.steps(vector), self.bases(vector)

        def quads(number: Expr | int) -> Quads:
            first, second = (
                T.bind(T.call_pure_extern("int32x16", "xllm_on_grid", half, steps, bases))
                for half in self.numbers(vector, number)
            )
            return first, second

        return quads

    def numbers(self, vector: int, number: Expr | int) -> Quads:
        """The stored numbers, 0 to 15, at the same quads."""
        where = self._start + PANEL + number * _BOTH + vector * LANES * QUAD
        both = T.bind(T.call_extern("int32x16", "xllm_load_i32", address(self._w, where)))
        low = T.broadcast(T.int32(0x0F0F0F0F), LANES)
        high = T.shift_right(both, T.broadcast(T.int32(4), LANES))
        return T.bind(T.bitwise_and(both, low)), T.bind(T.bitwise_and(high, low))

    def steps(self, vector: int) -> Expr:
        """The steps of 16 columns, in both halves of each 32 bits."""
        return T.bind(T.call_pure_extern("int32x16", f"xllm_grid_steps_{vector}", self._steps))

    def bases(self, vector: int) -> Expr:
        """The byte that n = 0 stands for, of 16 columns, in all four bytes of each 32 bits."""
        return T.bind(T.call_pure_extern("int32x16", f"xllm_grid_bases_{vector}", self._bases))


def each_run(q: GridFormat, length: int, body: Callable[[Expr, int], None]) -> None:
    """Emits `body(run, how many values)` for the runs of `length` values of k, a multiple of 16. The last run may be
    half as long."""
    whole, rest = divmod(length, q.grid)
    if whole:
        with T.serial(0, whole) as run:
            body(run, q.grid)
    if rest:
        assert rest == STEP
        body(T.int32(whole), rest)


def unpack_runs(q: GridFormat, w: Expr, start: Expr, length: int, to: Expr) -> None:
    """Emits: unpacks `length` values of k of a panel to `to`, in the order of a panel of 8 bits. Its runs begin at byte
    `start` of `w`."""

    def one(number: Expr, valid: int) -> None:
        run = Run(w, T.bind(start + T.Cast("int64", number) * q.run_bytes))
        for vector in range(PANEL // LANES):
            quads = run.columns(vector)
            for pair in range(valid // (2 * QUAD)):
                for half, quad in enumerate(quads(pair)):
                    at = number * (q.grid * PANEL) + ((2 * pair + half) * _BOTH + vector * LANES * QUAD)
                    T.evaluate(T.call_extern("int32", "xllm_store_i32", address(to, at), quad))

    each_run(q, length, one)
