"""`Embedding` gathers rows: from plain rows, or from the panels of a tied output layer, quantized or not.

Ids are not checked here: the runtime checks token ids when a request arrives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from tvm.tirx.script.builder import ir as T

from xllm_compiler.kernels.tir.codegen.builder import address, build_function, share, stack_array
from xllm_compiler.kernels.tir.codegen.kernel import MEMBER_ARGS, Arg, Kernel, require, scalar
from xllm_compiler.kernels.tir.isa.levels import LANES, Isa
from xllm_compiler.kernels.tir.rows.quantize import check_rotation, rotate_row
from xllm_compiler.weight_formats import PANEL, QUAD, GridFormat, IntegerFormat, Layout, WeightFormat

Expr = Any


@dataclass(frozen=True)
class Embedding(Kernel):
    """y[rows, dim] = w[ids]; `layout` of w is "row", "panel" or a weight format's (weight_formats.py). `rotate`: the
    blocks in which a quantized w was rotated, and rows are rotated back; 0: it was not."""

    dim: int
    dtype: str
    layout: str = "row"
    rotate: int = 0

    def __post_init__(self) -> None:
        require(self.dim > 0, f"an embedding of {self.dim} columns", self)
        require(self.dtype in ("bf16", "f32"), f"an embedding in {self.dtype}", self)
        require(not self.rotate or self.format is not None, f"an embedding rotated from layout {self.layout}", self)
        check_rotation(self, self.dim, self.rotate)

    @property
    def format(self) -> WeightFormat | None:
        """How w is quantized, if it is."""
        return Layout.parse(self.layout).format

    @property
    def args(self) -> tuple[Arg, ...]:
        dtype = "u8" if self.format else self.dtype
        ids, w = Arg("ids", "i32", "rows"), Arg("w", dtype, f"vocab, {self.dim} as {self.layout}")
        return (ids, w, Arg("y", self.dtype, f"rows, {self.dim}", written=True), scalar("rows"), *MEMBER_ARGS)

    def build(self, isa: Isa) -> Any:
        def body(ids: Expr, w: Expr, y: Expr, rows: Expr, member: Expr, team: Expr) -> None:
            found = stack_array(self.dim, "float32") if self.rotate else None
            first, last = share(rows, member, team)
            with T.serial(first, last) as row:
                to = T.bind(T.Cast("int64", row) * self.dim)
                here = T.bind(T.Cast("int64", ids[row]))
                if self.layout == "row":
                    _copy(y, to, w, T.bind(here * self.dim), self.dim)
                    return
                panel = T.bind(T.truncdiv(here, T.int64(PANEL)))
                column = T.bind(T.truncmod(here, T.int64(PANEL)))
                if self.format is not None:
                    if found is None:
                        self._dequantize(self.format, w, panel, column, y, to, self.dtype)
                    else:
                        self._dequantize(self.format, w, panel, column, found, T.int32(0), "f32")
                        rotate_row(self.rotate, self.dim, "f32", found, T.int32(0), y, to, self.dtype)
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

    def _dequantize(
        self, format: WeightFormat, w: Expr, panel: Expr, column: Expr, y: Expr, to: Expr, dtype: str
    ) -> None:
        """One row of a quantized panel, to y in `dtype`: a column of it, a quad at a time."""
        name = "xllm_put_f32" if dtype == "f32" else "xllm_round_put_bf16"
        with T.serial(0, format.groups(self.dim)) as group:
            start = T.bind(panel * format.panel_bytes(self.dim) + T.Cast("int64", group) * format.group_bytes(self.dim))
            scale = T.call_extern(
                "float32", f"xllm_scale_{format.scale_dtype}", address(w, start + column * format.scale_bytes)
            )
            scale = T.bind(scale)
            zero = T.float32(format.zero)
            if format.zeros:
                zero = T.bind(T.Cast("float32", w[start + PANEL * format.scale_bytes + column]))

            def put(i: Expr, stored: Expr) -> None:
                value = T.bind((T.Cast("float32", stored) - zero) * scale)
                T.evaluate(T.call_extern("int32", name, address(y, to + i), value))

            _VALUES[type(format)](format, w, start, group, column, self.dim, put)


Put = Callable[[Expr, Expr], None]


def _integers(format: IntegerFormat, w: Expr, start: Expr, group: Expr, column: Expr, dim: int, put: Put) -> None:
    """Emits `put(i, stored)` for the values of one column of a group, which begins at byte `start` of `w`. All groups
    together have `dim` values."""
    length = format.group or format.padded(dim)
    values = T.bind(start + format.header_bytes + column * QUAD)
    with T.serial(0, T.min(length, dim - group * length)) as i:
        quad, rest = T.truncdiv(i, T.int32(QUAD)), T.truncmod(i, T.int32(QUAD))
        if format.bits == 8:
            stored = T.Cast("int32", w[values + quad * (PANEL * QUAD) + rest])
        else:
            byte = T.Cast("int32", w[values + T.truncdiv(quad, T.int32(2)) * (PANEL * QUAD) + rest])
            stored = T.bitwise_and(T.shift_right(byte, T.truncmod(quad, T.int32(2)) * 4), T.int32(15))
        put(group * length + i, stored)


def _on_grids(format: GridFormat, w: Expr, start: Expr, group: Expr, column: Expr, dim: int, put: Put) -> None:
    """The same for the bytes of a column on grids. The panel is one group."""
    a, rest = T.truncdiv(column, T.int64(LANES)), T.truncmod(column, T.int64(LANES))
    b, c = T.truncdiv(rest, T.int64(4)), T.truncmod(rest, T.int64(4))
    head_at = T.bind(LANES * b + 4 * a + c)
    with T.serial(0, -(-dim // format.grid)) as run:
        at = T.bind(start + format.header_bytes + T.Cast("int64", run) * format.run_bytes)
        head = T.bind(T.Cast("int32", w[at + head_at]))
        step, point = T.bitwise_and(head, T.int32(15)), T.shift_right(head, T.int32(4))
        with T.serial(0, T.min(format.grid, dim - run * format.grid)) as i:
            quad, rest = T.truncdiv(i, T.int32(QUAD)), T.truncmod(i, T.int32(QUAD))
            both = T.Cast("int32", w[at + PANEL + T.truncdiv(quad, T.int32(2)) * (PANEL * QUAD) + column * QUAD + rest])
            n = T.bitwise_and(T.shift_right(both, T.truncmod(quad, T.int32(2)) * 4), T.int32(15))
            put(run * format.grid + i, T.bind((n - point) * step + format.zero))


_VALUES: Final[dict[type[WeightFormat], Callable[..., None]]] = {IntegerFormat: _integers, GridFormat: _on_grids}


def _copy(y: Expr, to: Expr, w: Expr, source: Expr, count: int) -> None:
    """Emits y[to : to + count] = w[source : source + count], without any conversion."""
    if count >= LANES:
        with T.serial(0, count // LANES) as i:
            T.buffer_store(y, w[T.ramp(source + i * LANES, 1, LANES)], [T.ramp(to + i * LANES, 1, LANES)])
    for i in range(count // LANES * LANES, count):
        T.buffer_store(y, w[source + i], [to + i])
