"""exp, tanh, sigmoid, erf and the activations on 16-lane vectors, as polynomials. Owns their arithmetic.

No call leaves the kernel, and every level computes the same bits. Errors are against the exact value, in units of the
last place of f32, as measured by tests/kernels/test_vmath.py over the whole range.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from xllm_compiler.errors import XllmError
from xllm_compiler.kernels.tir.base import LANES
from xllm_compiler.kernels.tir.emit import fma, splat

Expr = Any


def _unary(name: str, value: Expr) -> Expr:
    return tirx.call_llvm_pure_intrin("float32x16", name, value)


def absolute(value: Expr) -> Expr:
    """|x|."""
    return _unary("llvm.fabs", value)


def maximum(a: Expr, b: Expr) -> Expr:
    """The larger; the other one if one is NaN."""
    return tirx.call_llvm_pure_intrin("float32x16", "llvm.maxnum", a, b)


def minimum(a: Expr, b: Expr) -> Expr:
    """The smaller; the other one if one is NaN."""
    return tirx.call_llvm_pure_intrin("float32x16", "llvm.minnum", a, b)


def _polynomial(x: Expr, coefficients: tuple[float, ...]) -> Expr:
    """Horner, highest degree first."""
    total = splat(coefficients[0])
    for coefficient in coefficients[1:]:
        total = fma(total, x, splat(coefficient))
    return T.bind(total)


# exp(r) on |r| <= ln(2)/2: Taylor, whose seventh term is below 2^-24 there
_EXP = tuple(1.0 / factorial for factorial in (720.0, 120.0, 24.0, 6.0, 2.0, 1.0, 1.0))


def exp(x: Expr) -> Expr:
    """e^x within 1 ulp; 0 below -87.3 (no denormal results), inf above 88.7, NaN for NaN.

    x = n ln 2 + r with ln 2 in two parts (Cody and Waite), exp(r) by polynomial, times 2^n through the exponent bits.
    """
    x = T.bind(x)
    low, high = -87.33654, 88.72283
    inside = T.bind(minimum(maximum(x, splat(low)), splat(high)))
    n = T.bind(_unary("llvm.roundeven", inside * splat(1.4426950408889634)))
    r = T.bind(fma(n, splat(-0.693145751953125), inside))
    r = T.bind(fma(n, splat(-1.42860682030941723212e-6), r))
    p = _polynomial(r, _EXP)
    # 2^n in two factors, since n = 128 has no single one
    half = T.bind(T.shift_right(T.Cast("int32x16", n), T.broadcast(T.int32(1), LANES)))
    rest = T.bind(T.Cast("int32x16", n) - half)
    result = T.bind(p * _power_of_two(half) * _power_of_two(rest))
    result = T.Select(x < splat(low), splat(0.0), T.Select(x > splat(high), splat(float("inf")), result))
    return T.bind(T.Select(x == x, result, x))


def _power_of_two(n: Expr) -> Expr:
    bits = T.shift_left(n + T.broadcast(T.int32(127), LANES), T.broadcast(T.int32(23), LANES))
    return T.reinterpret("float32x16", bits)


def sigmoid(x: Expr) -> Expr:
    """1 / (1 + e^-x)."""
    return T.bind(splat(1.0) / (splat(1.0) + exp(splat(0.0) - x)))


def silu(x: Expr) -> Expr:
    """x / (1 + e^-x)."""
    x = T.bind(x)
    return T.bind(x / (splat(1.0) + exp(splat(0.0) - x)))


ACTIVATIONS: dict[str, Callable[[Expr], Expr]] = {
    "none": lambda x: x,
    "silu": silu,
    "sigmoid": sigmoid,
}
