"""Row gather: `Embedding`, from plain rows or from the panels that a tied output layer uses, quantized ones too.

An id is trusted to be in range: the runtime checks token ids when a request arrives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from xllm_compiler.kernels.layouts import QUAD, Quantization
from xllm_compiler.kernels.tir.codegen.builder import address, build_function, share
from xllm_compiler.kernels.tir.codegen.kernel import MEMBER_ARGS, PANEL, Arg, Kernel, require, scalar
from xllm_compiler.kernels.tir.isa.levels import LANES, Isa

Expr = Any


@dataclass(frozen=True)
class Embedding(Kernel):
    """y[rows, dim] = w[ids]; `layout` of w is "row", "panel" or a quantized form (layouts.py)."""

    dim: int
    dtype: str
    layout: str = "row"

    def __post_init__(self) -> None:
        require(self.dim > 0, f"an embedding of {self.dim} columns", self)
        require(self.dtype in ("bf16", "f32"), f"an embedding in {self.dtype}", self)

    @property
    def form(self) -> Quantization | None:
        """How w is quantized, if it is."""
        return None if self.layout in ("row", "panel") else Quantization.parse(self.layout)

    @property
    def args(self) -> tuple[Arg, ...]:
        dtype = "u8" if self.form else self.dtype
        ids, w = Arg("ids", "i32", "rows"), Arg("w", dtype, f"vocab, {self.dim} as {self.layout}")
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
                if self.form is not None:
                    self._dequantize(self.form, w, panel, column, y, to)
                    return
                with T.serial(0, self.dim) as i:
                    if self.dtype == "f32":
                        source = (panel * self.dim + i) * PANEL + column
                    else:
                        pairs = -(-self.dim // 2)
                        pair, half = T.truncdiv(i, T.int32(2)), T.truncmod(i, T.int32(2))
                        source = ((panel * pairs + pair) * PANEL + column) * 2 + half
                    T.buffer_store(y, w[source], [to + i])

        return build_function(self, isa, body)

    def _dequantize(self, form: Quantization, w: Expr, panel: Expr, column: Expr, y: Expr, to: Expr) -> None:
        """One row of a quantized panel: a column of it, a quad at a time."""
        length = form.group or form.padded(self.dim)
        name = "xllm_put_f32" if self.dtype == "f32" else "xllm_round_put_bf16"

        def put(i: Expr, stored: Expr, zero: Expr, scale: Expr) -> None:
            value = T.bind((T.Cast("float32", stored) - zero) * scale)
            T.evaluate(T.call_extern("int32", name, address(y, to + i), value))

        with T.serial(0, form.groups(self.dim)) as group:
            start = T.bind(panel * form.panel_bytes(self.dim) + T.Cast("int64", group) * form.group_bytes(self.dim))
            scale = T.call_extern(
                "float32", f"xllm_scale_{form.scale_dtype}", address(w, start + column * form.scale_bytes)
            )
            scale = T.bind(scale)
            zero = T.float32(form.middle)
            if form.zeros:
                zero = T.bind(T.Cast("float32", w[start + PANEL * form.scale_bytes + column]))
            if form.grid:
                _on_grids(form, w, start, column, self.dim, lambda i, stored: put(i, stored, zero, scale))
                return
            values = T.bind(start + form.header_bytes + column * QUAD)
            with T.serial(0, T.min(length, self.dim - group * length)) as i:
                quad, rest = T.truncdiv(i, T.int32(QUAD)), T.truncmod(i, T.int32(QUAD))
                if form.bits == 8:
                    stored = T.Cast("int32", w[values + quad * (PANEL * QUAD) + rest])
                else:
                    byte = T.Cast("int32", w[values + T.truncdiv(quad, T.int32(2)) * (PANEL * QUAD) + rest])
                    stored = T.bitwise_and(T.shift_right(byte, T.truncmod(quad, T.int32(2)) * 4), T.int32(15))
                put(group * length + i, stored, zero, scale)


def _on_grids(
    form: Quantization, w: Expr, start: Expr, column: Expr, dim: int, put: Callable[[Expr, Expr], None]
) -> None:
    """`put(i, byte)` for the first `dim` values of a column of the panel at byte `start`, which is on grids."""
    a, rest = T.truncdiv(column, T.int64(LANES)), T.truncmod(column, T.int64(LANES))
    b, c = T.truncdiv(rest, T.int64(4)), T.truncmod(rest, T.int64(4))
    head_at = T.bind(LANES * b + 4 * a + c)
    with T.serial(0, -(-dim // form.grid)) as run:
        at = T.bind(start + form.header_bytes + T.Cast("int64", run) * form.run_bytes)
        head = T.bind(T.Cast("int32", w[at + head_at]))
        step, point = T.bitwise_and(head, T.int32(15)), T.shift_right(head, T.int32(4))
        with T.serial(0, T.min(form.grid, dim - run * form.grid)) as i:
            quad, rest = T.truncdiv(i, T.int32(QUAD)), T.truncmod(i, T.int32(QUAD))
            both = T.Cast("int32", w[at + PANEL + T.truncdiv(quad, T.int32(2)) * (PANEL * QUAD) + column * QUAD + rest])
            n = T.bitwise_and(T.shift_right(both, T.truncmod(quad, T.int32(2)) * 4), T.int32(15))
            put(run * form.grid + i, T.bind((n - point) * step + form.middle))


def _copy(y: Expr, to: Expr, w: Expr, source: Expr, count: int) -> None:
    """y[to : to + count] = w[source : source + count], untouched by any conversion."""
    if count >= LANES:
        with T.serial(0, count // LANES) as i:
            T.buffer_store(y, w[T.ramp(source + i * LANES, 1, LANES)], [T.ramp(to + i * LANES, 1, LANES)])
    for i in range(count // LANES * LANES, count):
        T.buffer_store(y, w[source + i], [to + i])
