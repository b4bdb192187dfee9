"""`WideRows`: rows of bf16 that are widened to f32 once for all panels, where no instruction multiplies bf16.

Each member has a copy on its stack, of as many rows as half a second-level cache holds. Widening every operand of every
product would take a third as many instructions as the products, and a row is multiplied by hundreds of panels.
"""

from __future__ import annotations

from typing import Any

from tvm.tirx.script.builder import ir as T

from xllm_compiler.kernels.tir.codegen.builder import Scalars, load_part, splat, stack_array, store
from xllm_compiler.kernels.tir.isa.levels import LANES, Isa
from xllm_compiler.kernels.tir.rows.norms import each_vector

Expr = Any
_BYTES = 1 << 20
_LEAST = 16  # rows: with room for fewer it is not done


class WideRows:
    """The rows of x [rows, k] that `take` widened last."""

    def __init__(self, x: Expr, k: int) -> None:
        self._x, self._k, self._stride = x, k, _stride(k)
        self._held = stack_array(self.most(k) * self._stride, "float32")
        self._top = Scalars(1, "int32")
        self._top[0] = T.int32(-1)

    @staticmethod
    def can(isa: Isa, dtype: str, k: int) -> bool:
        """Whether rows of `dtype` should be widened at this level, and there is room for them."""
        return dtype == "bf16" and not isa.has_bf16_dot and WideRows.most(k) >= _LEAST

    @staticmethod
    def most(k: int) -> int:
        """How many rows there are at most."""
        return _BYTES // (4 * _stride(k))

    def take(self, top: Expr, here: Expr) -> None:
        """Emits: widens `here` rows from row `top` on, unless the rows that it holds already begin there."""
        with T.If(self._top[0] != top), T.Then():
            self._top[0] = top
            with T.serial(0, here) as i:
                source = T.bind(T.Cast("int64", top + i) * self._k)
                to = T.bind(i * self._stride)

                def part(at: Expr, valid: int) -> None:
                    store(self._held, to + at, load_part(self._x, source + at, valid, "bf16"), "f32")

                each_vector(self._k, part)

    def of(self, row: Expr, count: int) -> Any:
        """`operand(i, at)`: element `at` of row `row + i`, in all lanes; i < `count`."""
        begin = T.bind((row - self._top[0]) * self._stride)
        return lambda i, at: T.bind(splat(self._held[begin + at + i * self._stride]))


def _stride(k: int) -> int:
    """The distance of two rows, in f32: an odd number of cache lines. With an even number the rows of a tile would
    share few sets of the first-level cache."""
    return (-(-k // LANES) | 1) * LANES
