"""Rows of bf16 widened to f32 once for all panels that they meet, where no instruction multiplies bf16: `WideRows`.

Owns the copy. Each member has its own, on its stack, of as many rows as half a second-level cache holds: widening every
operand of every product takes as many instructions as a third of the products, and a row meets hundreds of panels.
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
    """The rows of x [rows, k] that `take` named last."""

    def __init__(self, x: Expr, k: int) -> None:
        self._x, self._k, self._stride = x, k, _stride(k)
        self._held = stack_array(self.most(k) * self._stride, "float32")
        self._top = Scalars(1, "int32")
        self._top[0] = T.int32(-1)

    @staticmethod
    def can(isa: Isa, dtype: str, k: int) -> bool:
        """Whether rows of `dtype` are to be widened at this level, and there is room for them."""
        return dtype == "bf16" and not isa.has_bf16_dot and WideRows.most(k) >= _LEAST

    @staticmethod
    def most(k: int) -> int:
        """How many rows there are at most."""
        return _BYTES // (4 * _stride(k))

    def take(self, top: Expr, here: Expr) -> None:
        """Emits: `here` rows from row `top` on are widened, unless the last that were taken began there too."""
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
    """f32 from row to row: whole lines, and an odd number of them, lest the rows of a tile fall on the same few lines
    of the first-level cache."""
    return (-(-k // LANES) | 1) * LANES
