"""Rotary position embedding: the rotation of one head in either style, and the kernel `Rope`.

    half            pairs (i, i + R/2)      interleaved     pairs (2i, 2i + 1)      for i < R/2, R = rotary

Elements from R on pass through. cos and sin are f32 [rows, R/2].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from xllm_compiler.kernels.tir.codegen.builder import build_function, fma, load_part, share, store_part
from xllm_compiler.kernels.tir.codegen.kernel import MEMBER_ARGS, Arg, Kernel, require, scalar
from xllm_compiler.kernels.tir.isa.levels import Isa
from xllm_compiler.kernels.tir.rows.norms import each_vector

Expr = Any
STYLES = ("half", "interleaved")


def check_rotary(rotary: int, style: str, dim: int, kernel: object) -> None:
    """Refuses what `rotate` cannot do."""
    require(style in STYLES, f"rotary style {style!r}", kernel)
    require(0 < rotary <= dim and rotary % 2 == 0, f"rotation of {rotary} of {dim} elements", kernel)


def rotate(
    read: Callable[[Expr], Expr],
    write: Callable[[Expr, Expr], None],
    cos: Expr,
    sin: Expr,
    at: Expr,
    rotary: int,
    style: str,
) -> None:
    """Emits the rotation of one head. `read(i)` and `write(i, value)` read and write its f32 elements. An element may
    be written where it was read, and nowhere else in the memory that is read. `at`: the row's offset in cos and sin."""
    half = rotary // 2
    with T.serial(0, half) as i:
        first, second = (i, i + half) if style == "half" else (i * 2, i * 2 + 1)
        a, b = T.bind(read(first)), T.bind(read(second))
        c, s = T.bind(cos[at + i]), T.bind(sin[at + i])
        write(first, fma(a, c, T.float32(0.0) - b * s))
        write(second, fma(b, c, a * s))


@dataclass(frozen=True)
class Rope(Kernel):
    """y[rows, heads, dim] = x with the first `rotary` elements of each head rotated."""

    heads: int
    dim: int
    rotary: int
    style: str
    dtype: str

    def __post_init__(self) -> None:
        require(self.heads > 0, f"{self.heads} heads", self)
        require(self.dtype in ("bf16", "f32"), f"rotation in {self.dtype}", self)
        check_rotary(self.rotary, self.style, self.dim, self)

    @property
    def args(self) -> tuple[Arg, ...]:
        shape, angles = f"rows, {self.heads}, {self.dim}", f"rows, {self.rotary // 2}"
        pointers = (Arg("x", self.dtype, shape), Arg("cos", "f32", angles), Arg("sin", "f32", angles))
        return (*pointers, Arg("y", self.dtype, shape, written=True), scalar("rows"), *MEMBER_ARGS)

    def build(self, isa: Isa) -> Any:
        def body(x: Expr, cos: Expr, sin: Expr, y: Expr, rows: Expr, member: Expr, team: Expr) -> None:
            first, last = share(rows * self.heads, member, team)
            head = T.alloc_buffer((self.dim,), "float32", scope="local")
            with T.serial(first, last) as unit:
                base = T.bind(T.Cast("int64", unit) * self.dim)
                at = T.bind(T.truncdiv(unit, T.int32(self.heads)) * (self.rotary // 2))

                def read_in(i: Expr, valid: int) -> None:
                    store_part(head, i, load_part(x, base + i, valid, self.dtype), valid, "f32")

                def write_out(i: Expr, valid: int) -> None:
                    store_part(y, base + i, load_part(head, i, valid, "f32"), valid, self.dtype)

                each_vector(self.dim, read_in)
                rotate(
                    lambda i: head[i],
                    lambda i, value: T.buffer_store(head, value, [i]),
                    cos, sin, at, self.rotary, self.style,
                )  # fmt: skip
                each_vector(self.dim, write_out)

        return build_function(self, isa, body)
