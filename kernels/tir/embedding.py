"""Row gather: `Embedding`, from plain rows or from the panels that a tied output layer uses. Owns nothing else.

An id is trusted to be in range: the runtime checks token ids when a request arrives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from xllm_compiler.kernels.tir.base import LANES, MEMBER_ARGS, PANEL, Arg, Isa, Kernel, require, scalar
from xllm_compiler.kernels.tir.emit import build_function, share

Expr = Any


@dataclass(frozen=True)
class Embedding(Kernel):
    """y[rows, dim] = w[ids]; `layout` of w is "row" or "panel"."""

    dim: int
    dtype: str
    layout: str = "row"

    def __post_init__(self) -> None:
        require(self.dim > 0, f"an embedding of {self.dim} columns", self)
        require(self.dtype in ("bf16", "f32"), f"an embedding in {self.dtype}", self)
        require(self.layout in ("row", "panel"), f"an embedding in {self.layout} layout", self)

    @property
    def args(self) -> tuple[Arg, ...]:
        ids, w = Arg("ids", "i32", "rows"), Arg("w", self.dtype, f"vocab, {self.dim} as {self.layout}")
        return (ids, w, Arg("y", self.dtype, f"rows, {self.dim}", written=True), scalar("rows"), *MEMBER_ARGS)

    def build(self, isa: Isa) -> Any:
        def body(ids: Expr, w: Expr, y: Expr, rows: Expr, member: Expr, team: Expr) -> None:
            first, last = share(rows, member, team)
            with T.serial(first, last) as row:
                to = T.bind(T.Cast("int64", row) * self.dim)
                here = T.bind(T.Cast("int64", ids[row]))
                if self.layout == "row":
                    _copy(y, to, w, T.bind(here * self.dim), self.dim)
                    return
                panel = T.bind(T.truncdiv(here, T.int64(PANEL)))
                column = T.bind(T.truncmod(here, T.int64(PANEL)))
                with T.serial(0, self.dim) as i:
                    if self.dtype == "f32":
                        source = (panel * self.dim + i) * PANEL + column
                    else:
                        pairs = -(-self.dim // 2)
                        pair, half = T.truncdiv(i, T.int32(2)), T.truncmod(i, T.int32(2))
                        source = ((panel * pairs + pair) * PANEL + column) * 2 + half
                    T.buffer_store(y, w[source], [to + i])

        return build_function(self, isa, body)


def _copy(y: Expr, to: Expr, w: Expr, source: Expr, count: int) -> None:
    """y[to : to + count] = w[source : source + count], untouched by any conversion."""
    if count >= LANES:
        with T.serial(0, count // LANES) as i:
            T.buffer_store(y, w[T.ramp(source + i * LANES, 1, LANES)], [T.ramp(to + i * LANES, 1, LANES)])
    for i in range(count // LANES * LANES, count):
        T.buffer_store(y, w[source + i], [to + i])
