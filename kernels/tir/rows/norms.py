"""Normalisation kernels: `RmsNorm`, `AddRmsNorm`, `LayerNorm`.

Rows are shared out to members. Statistics are f32: 16 lanes (four vectors at a time, then the rest in order), then a
fixed tree. So a row's bits depend on the row alone. `AddRmsNorm` rounds the sum to the model's type before it is
normalised, as two separate ops would.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from xllm_compiler.kernels.tir.codegen.builder import (
    Vectors,
    build_function,
    fma,
    horizontal_sum,
    load_part,
    share,
    splat,
    store_part,
)
from xllm_compiler.kernels.tir.codegen.kernel import MEMBER_ARGS, Arg, Kernel, require, scalar
from xllm_compiler.kernels.tir.isa.levels import LANES, Isa

Expr = Any
_UNROLL = 4


def each_vector(n: int, body: Callable[[Expr, int], None]) -> None:
    """Emits `body(offset, valid)` for the vectors of n elements. `valid`: 16, or fewer in the last vector."""
    if n >= LANES:
        with T.serial(0, n // LANES) as i:
            body(i * LANES, LANES)
    if n % LANES:
        body(T.int32(n // LANES * LANES), n % LANES)


def row_sum(n: int, term: Callable[[Expr, int, Expr], Expr]) -> Expr:
    """The sum over n elements, as a scalar. `term(offset, valid, total)` is `total` plus one vector's terms. Lanes from
    `valid` on must add 0."""
    totals = Vectors(_UNROLL)
    for i in range(_UNROLL):
        totals[i] = splat(0.0)
    block = LANES * _UNROLL
    if n >= block:
        with T.serial(0, n // block) as i:
            for j in range(_UNROLL):
                totals[j] = term(i * block + j * LANES, LANES, totals[j])
    for index in range(n // block * _UNROLL, -(-n // LANES)):
        j = index % _UNROLL
        totals[j] = term(T.int32(index * LANES), min(n - index * LANES, LANES), totals[j])
    return T.bind(horizontal_sum((totals[0] + totals[1]) + (totals[2] + totals[3])))


def square_sum(x: Expr, base: Expr, n: int, dtype: str) -> Expr:
    """Sum of squares of n elements from `base`."""

    def term(offset: Expr, valid: int, total: Expr) -> Expr:
        value = T.bind(load_part(x, base + offset, valid, dtype))
        return fma(value, value, total)

    return row_sum(n, term)


def inverse_root(mean_square: Expr, eps: float) -> Expr:
    """1 / sqrt(mean_square + eps), a scalar."""
    root = tirx.call_llvm_pure_intrin("float32", "llvm.sqrt", mean_square + T.float32(eps))
    return T.bind(T.float32(1.0) / root)


def gain(w: Expr, index: Expr, valid: int, dtype: str, offset: float) -> Expr:
    """w + offset, for one vector."""
    value = load_part(w, index, valid, dtype)
    return value + splat(offset) if offset else value


def _each_row(rows: Expr, member: Expr, team: Expr, n: int, body: Callable[[Expr], None]) -> None:
    first, last = share(rows, member, team)
    with T.serial(first, last) as row:
        body(T.bind(T.Cast("int64", row) * n))


def scale_row(kernel: Any, source: Expr, base: Expr, w: Expr, y: Expr, target: Expr) -> None:
    """y = source / rms(source) * (w + offset) for the row that begins at `base`; y's begins at `target`. `kernel` says
    n, dtype, eps and offset; w is None where there is none."""
    total = square_sum(source, base, kernel.n, kernel.dtype)
    factor = T.bind(splat(inverse_root(total / T.float32(kernel.n), kernel.eps)))

    def body(at: Expr, valid: int) -> None:
        value = load_part(source, base + at, valid, kernel.dtype) * factor
        if w is not None:
            value = value * gain(w, at, valid, kernel.dtype, kernel.offset)
        store_part(y, target + at, value, valid, kernel.dtype)

    each_vector(kernel.n, body)


def centre_row(kernel: Any, x: Expr, base: Expr, w: Expr, b: Expr, y: Expr, target: Expr) -> None:
    """y = (x - mean) / sqrt(var + eps) * w + b for the row that begins at `base`; y's begins at `target`. `kernel` says
    n, dtype and eps; w and b are None where there are none."""
    n, dtype = kernel.n, kernel.dtype
    total = row_sum(n, lambda at, valid, sums: sums + load_part(x, base + at, valid, dtype))
    mean = T.bind(splat(total / T.float32(n)))

    def deviation(at: Expr, valid: int, sums: Expr) -> Expr:
        value = T.bind(load_part(x, base + at, valid, dtype) - mean)
        if valid < LANES:  # lanes that do not exist were loaded as 0, and 0 - mean is not 0
            lanes = T.ramp(T.int32(0), 1, LANES)
            value = T.bind(T.Select(lanes < T.broadcast(T.int32(valid), LANES), value, splat(0.0)))
        return fma(value, value, sums)

    factor = T.bind(splat(inverse_root(row_sum(n, deviation) / T.float32(n), kernel.eps)))

    def write(at: Expr, valid: int) -> None:
        value = (load_part(x, base + at, valid, dtype) - mean) * factor
        if w is not None and b is not None:
            value = fma(value, load_part(w, at, valid, dtype), load_part(b, at, valid, dtype))
        elif w is not None:
            value = value * load_part(w, at, valid, dtype)
        elif b is not None:
            value = value + load_part(b, at, valid, dtype)
        store_part(y, target + at, value, valid, dtype)

    each_vector(n, write)


def _check(kernel: Any) -> None:
    require(kernel.n > 0, f"a norm over {kernel.n} elements", kernel)
    require(kernel.dtype in ("bf16", "f32"), f"a norm in {kernel.dtype}", kernel)


@dataclass(frozen=True)
class RmsNorm(Kernel):
    """y = x / sqrt(mean(x^2) + eps) * (w + offset), over the last n elements; without `weight` no factor."""

    n: int
    dtype: str
    eps: float
    offset: float = 0.0
    weight: bool = True

    def __post_init__(self) -> None:
        _check(self)

    @property
    def args(self) -> tuple[Arg, ...]:
        weight = (Arg("w", self.dtype, f"{self.n}"),) if self.weight else ()
        x, y = Arg("x", self.dtype, f"rows, {self.n}"), Arg("y", self.dtype, f"rows, {self.n}", written=True)
        return (x, *weight, y, scalar("rows"), *MEMBER_ARGS)

    def build(self, isa: Isa) -> Any:
        def body(x: Expr, y: Expr, rows: Expr, member: Expr, team: Expr, w: Expr = None) -> None:
            _each_row(rows, member, team, self.n, lambda base: scale_row(self, x, base, w, y, base))

        return build_function(self, isa, body)


@dataclass(frozen=True)
class AddRmsNorm(Kernel):
    """sum = x + res; y = sum / sqrt(mean(sum^2) + eps) * (w + offset)."""

    n: int
    dtype: str
    eps: float
    offset: float = 0.0

    def __post_init__(self) -> None:
        _check(self)

    @property
    def args(self) -> tuple[Arg, ...]:
        shape = f"rows, {self.n}"
        reads = (Arg("x", self.dtype, shape), Arg("res", self.dtype, shape), Arg("w", self.dtype, f"{self.n}"))
        writes = (Arg("y", self.dtype, shape, written=True), Arg("sum", self.dtype, shape, written=True))
        return (*reads, *writes, scalar("rows"), *MEMBER_ARGS)

    def build(self, isa: Isa) -> Any:
        def body(x: Expr, res: Expr, w: Expr, y: Expr, sum: Expr, rows: Expr, member: Expr, team: Expr) -> None:
            def row(base: Expr) -> None:
                def add(at: Expr, valid: int) -> None:
                    first = load_part(x, base + at, valid, self.dtype)
                    second = load_part(res, base + at, valid, self.dtype)
                    store_part(sum, base + at, first + second, valid, self.dtype)

                each_vector(self.n, add)
                scale_row(self, sum, base, w, y, base)

            _each_row(rows, member, team, self.n, row)

        return build_function(self, isa, body)


@dataclass(frozen=True)
class LayerNorm(Kernel):
    """y = (x - mean) / sqrt(var + eps) * w + b, over the last n elements; the variance in a second pass."""

    n: int
    dtype: str
    eps: float
    weight: bool = True
    bias: bool = True

    def __post_init__(self) -> None:
        _check(self)

    @property
    def args(self) -> tuple[Arg, ...]:
        weight = (Arg("w", self.dtype, f"{self.n}"),) if self.weight else ()
        bias = (Arg("b", self.dtype, f"{self.n}"),) if self.bias else ()
        x, y = Arg("x", self.dtype, f"rows, {self.n}"), Arg("y", self.dtype, f"rows, {self.n}", written=True)
        return (x, *weight, *bias, y, scalar("rows"), *MEMBER_ARGS)

    def build(self, isa: Isa) -> Any:
        def body(x: Expr, y: Expr, rows: Expr, member: Expr, team: Expr, w: Expr = None, b: Expr = None) -> None:
            _each_row(rows, member, team, self.n, lambda base: centre_row(self, x, base, w, b, y, base))

        return build_function(self, isa, body)
