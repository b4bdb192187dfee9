"""The vocabulary projection with block maxima: `LinearBlockMax`; and block maxima alone: `BlockMax`.

The largest of every 64 logits is found while the projection still has them in registers. So a sampler that looks for
the largest logit reads one value in 64, and then one block. A block that holds NaN has NaN for its maximum, as in
numpy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from xllm_compiler.kernels.tir.codegen.builder import (
    build_function,
    keep_between,
    load_part,
    share,
    splat,
    store_part,
)
from xllm_compiler.kernels.tir.codegen.kernel import MEMBER_ARGS, Arg, Kernel, require, scalar
from xllm_compiler.kernels.tir.isa.levels import LANES, Isa
from xllm_compiler.kernels.tir.linear.linear import NEXT, Linear, panel_loop
from xllm_compiler.weight_formats import PANEL

Expr = Any


def _lanes(first: int, last: int) -> str:
    return f"<{last - first} x i32> <{', '.join(f'i32 {i}' for i in range(first, last))}>"


def _larger(name: str, width: int, a: str, b: str) -> str:
    # a comparison and a select: one instruction, where a maximum that handles NaN takes five
    return (
        f"  %{name}m = fcmp ogt <{width} x float> {a}, {b}\n"
        f"  %{name} = select <{width} x i1> %{name}m, <{width} x float> {a}, <{width} x float> {b}\n"
    )


def _halving() -> str:
    lines, name = [], "t"
    for width in (8, 4, 2, 1):
        whole = f"<{2 * width} x float>"
        for half, at in (("l", 0), ("h", width)):
            lanes = _lanes(at, at + width)
            lines.append(f"  %{name}{half} = shufflevector {whole} %{name}, {whole} poison, {lanes}\n")
        lines.append(_larger(f"{name}x", width, f"%{name}l", f"%{name}h"))
        name += "x"
    return "".join(lines) + f"  %r = extractelement <1 x float> %{name}, i32 0\n"


_LARGEST = (
    "define linkonce_odr float @xllm_largest("
    "<16 x float> %a, <16 x float> %b, <16 x float> %c, <16 x float> %d) {\n"
    "  %u = fcmp uno <16 x float> %a, %b\n"
    "  %v = fcmp uno <16 x float> %c, %d\n"
    "  %w = or <16 x i1> %u, %v\n"
    "  %bits = bitcast <16 x i1> %w to i16\n"
    "  %nan = icmp ne i16 %bits, 0\n"
    + _larger("s", 16, "%a", "%b")
    + _larger("q", 16, "%c", "%d")
    + _larger("t", 16, "%s", "%q")
    + _halving()
    + "  %y = select i1 %nan, float 0x7FF8000000000000, float %r\n  ret float %y\n}\n"
)
"""The largest of 64 values, NaN if one of them is NaN. Without NaN the comparisons may be in any order."""


def _put_largest(values: Sequence[Expr], columns: int, into: Expr, at: Expr) -> None:
    """Emits into[at] = the largest of the first `columns` of 64 values."""
    padded = []
    for vector, value in enumerate(values):
        count = min(columns - vector * LANES, LANES)
        if count <= 0:
            value = splat(-math.inf)
        elif count < LANES:
            value = keep_between(value, T.int32(0), T.int32(count), -math.inf)
        padded.append(T.bind(value))
    with T.attr("default", "pragma_import_llvm", _LARGEST):
        T.buffer_store(into, T.call_pure_extern("float32", "xllm_largest", *padded), [at])


@dataclass(frozen=True)
class LinearBlockMax(Kernel):
    """y[rows, n] = x[rows, k] @ w.T + bias in f32, and block[rows, n / 64], the largest of every 64 columns.

    Fields and arguments are those of `Linear`; there is no activation and no residual.
    """

    k: int
    n: int
    dtype: str
    bias: bool = False
    weights: str = ""
    most_rows: int | None = None

    @property
    def linear(self) -> Linear:
        """The projection alone."""
        return Linear(self.k, self.n, self.dtype, "f32", self.bias, weights=self.weights, most_rows=self.most_rows)

    @property
    def int8_dots(self) -> bool:
        return self.linear.int8_dots

    @property
    def panels(self) -> tuple[int, int]:
        """As of `Linear`."""
        return self.linear.panels

    @property
    def args(self) -> tuple[Arg, ...]:
        args = self.linear.args
        after = args.index(NEXT)
        return (*args[:after], _block_arg(self.n), *args[after:])

    def build(self, isa: Isa) -> Any:
        blocks = -(-self.n // PANEL)

        def finish(env: dict[str, Expr], row: Expr, panel: Expr, totals: Sequence[Expr], columns: int) -> None:
            values = []
            for vector, total in enumerate(totals):
                count = min(columns - vector * LANES, LANES)
                if count > 0:
                    at = T.bind(panel * PANEL + vector * LANES)
                    if self.bias:
                        total = T.bind(total + load_part(env["bias"], at, count, self.dtype))
                    store_part(env["y"], T.Cast("int64", row) * self.n + at, total, count, "f32")
                values.append(total)
            _put_largest(values, columns, env["block"], row * blocks + panel)

        return build_function(self, isa, panel_loop(self.linear, isa, finish))


@dataclass(frozen=True)
class BlockMax(Kernel):
    """block[rows, n / 64]: the largest of every 64 of x[rows, n], NaN where one of them is. The blocks of all rows are
    shared out to members."""

    n: int

    def __post_init__(self) -> None:
        require(self.n > 0, f"block maxima of {self.n} columns", self)

    @property
    def args(self) -> tuple[Arg, ...]:
        return (Arg("x", "f32", f"rows, {self.n}"), _block_arg(self.n), scalar("rows"), *MEMBER_ARGS)

    def build(self, isa: Isa) -> Any:
        blocks = -(-self.n // PANEL)
        tail = self.n - (blocks - 1) * PANEL

        def one(x: Expr, block: Expr, unit: Expr, start: Expr, columns: int) -> None:
            values = []
            for vector in range(PANEL // LANES):
                count = min(columns - vector * LANES, LANES)
                value = load_part(x, start + vector * LANES, count, "f32") if count > 0 else splat(-math.inf)
                values.append(T.bind(value))
            _put_largest(values, columns, block, unit)

        def body(x: Expr, block: Expr, rows: Expr, member: Expr, team: Expr) -> None:
            first, last = share(rows * blocks, member, team)
            with T.serial(first, last) as unit:
                row = T.bind(T.truncdiv(unit, T.int32(blocks)))
                at = T.bind(unit - row * blocks)
                start = T.bind(T.Cast("int64", row) * self.n + at * PANEL)
                if tail == PANEL:
                    one(x, block, unit, start, PANEL)
                    return
                with T.If(at < blocks - 1):
                    with T.Then():
                        one(x, block, unit, start, PANEL)
                    with T.Else():
                        one(x, block, unit, start, tail)

        return build_function(self, isa, body)


def _block_arg(n: int) -> Arg:
    return Arg("block", "f32", f"rows, {-(-n // PANEL)}", written=True)
