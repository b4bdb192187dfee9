"""`NormRows`: normalises and quantizes a row in one kernel.

The normalised row, rounded to the model's type, stays in the member's cache. That is one kernel and one barrier less
than `RmsNorm` or `LayerNorm` and then `QuantizeRows`, with the same bits. Rows are shared out to members.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from xllm_compiler.kernels.tir.codegen.builder import build_function, share, stack_array
from xllm_compiler.kernels.tir.codegen.kernel import MEMBER_ARGS, Arg, Kernel, require, scalar
from xllm_compiler.kernels.tir.isa.levels import Isa
from xllm_compiler.kernels.tir.rows.norms import centre_row, scale_row
from xllm_compiler.kernels.tir.rows.quantize import check_rotation, quantize_row, rotate_row
from xllm_compiler.weight_formats import RowFormat

Expr = Any
_MOST_BYTES = 1 << 20  # of a normalised row, which lies on the stack


@dataclass(frozen=True)
class NormRows(Kernel):
    """The norm of x[rows, n] (`kind`: rms or layer) to q i8 [rows, padded n], scale f32 [rows], sum i32 [rows, groups].

    `group`: that of the weights that the rows will be multiplied by. `by_group`: scale is [rows, groups]. `rotate`: as
    in `QuantizeRows`. Only rms has `offset`, only layer has `bias`."""

    kind: str
    n: int
    dtype: str
    eps: float
    offset: float = 0.0
    weight: bool = True
    bias: bool = False
    group: int = 0
    rotate: int = 0
    by_group: bool = False

    def __post_init__(self) -> None:
        require(self.kind in ("rms", "layer"), f"a norm of kind {self.kind}", self)
        require(self.dtype in ("bf16", "f32"), f"a norm in {self.dtype}", self)
        size = 2 if self.dtype == "bf16" else 4
        require(0 < self.n * size <= _MOST_BYTES, f"a norm over {self.n} {self.dtype}", self)
        require(not (self.bias if self.kind == "rms" else self.offset), f"bias or offset of a {self.kind} norm", self)
        check_rotation(self, self.n, self.rotate)

    @property
    def form(self) -> RowFormat:
        return RowFormat(self.group, self.by_group)

    @property
    def args(self) -> tuple[Arg, ...]:
        weight = (Arg("w", self.dtype, f"{self.n}"),) if self.weight else ()
        bias = (Arg("b", self.dtype, f"{self.n}"),) if self.bias else ()
        groups = self.form.groups(self.n)
        return (
            Arg("x", self.dtype, f"rows, {self.n}"),
            *weight,
            *bias,
            Arg("q", "i8", f"rows, {self.form.padded(self.n)}", written=True),
            Arg("scale", "f32", f"rows, {groups}" if self.by_group else "rows", written=True),
            Arg("sum", "i32", f"rows, {groups}", written=True),
            scalar("rows"),
            *MEMBER_ARGS,
        )

    def build(self, isa: Isa) -> Any:
        def body(
            x: Expr,
            q: Expr,
            scale: Expr,
            sum: Expr,
            rows: Expr,
            member: Expr,
            team: Expr,
            w: Expr = None,
            b: Expr = None,
        ) -> None:
            y = stack_array(self.n, "uint16" if self.dtype == "bf16" else "float32")
            turned = stack_array(self.n, "float32") if self.rotate else None
            first, last = share(rows, member, team)
            with T.serial(first, last) as row:
                base = T.bind(T.Cast("int64", row) * self.n)
                if self.kind == "rms":
                    scale_row(self, x, base, w, y, T.int32(0))
                else:
                    centre_row(self, x, base, w, b, y, T.int32(0))
                if turned is None:
                    quantize_row(self.form, self.n, self.dtype, y, T.int32(0), row, q, scale, sum)
                else:
                    rotate_row(self.rotate, self.n, self.dtype, y, T.int32(0), turned)
                    quantize_row(self.form, self.n, "f32", turned, T.int32(0), row, q, scale, sum)

        return build_function(self, isa, body)
