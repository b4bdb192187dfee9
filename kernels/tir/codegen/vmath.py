"""exp, tanh, sigmoid, erf and the activations on 16-lane vectors, as polynomials.

They call no library, and every level computes the same bits. Errors are against the exact value, in units of the last
place of f32; tests/kernels/test_vmath.py measures them over the whole range.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from xllm_compiler.kernels.tir.codegen.builder import fma, hold, splat
from xllm_compiler.kernels.tir.isa.levels import LANES

Expr = Any


def _unary(name: str, value: Expr) -> Expr:
    return tirx.call_llvm_pure_intrin("float32x16", name, value)


def absolute(value: Expr) -> Expr:
    """|x|."""
    return _unary("llvm.fabs", value)


def maximum(a: Expr, b: Expr) -> Expr:
    """The larger; `b` if one is NaN, as one instruction of x86 has it."""
    return T.Select(a > b, a, b)


def _polynomial(x: Expr, coefficients: tuple[float, ...]) -> Expr:
    """Horner, highest degree first."""
    total = splat(coefficients[0])
    for coefficient in coefficients[1:]:
        total = fma(total, x, splat(coefficient))
    return hold(total)


# exp(r) for |r| <= ln(2)/2 is 1 + r + r^2 q(r); q interpolated at five Chebyshev nodes, relative error 1.1e-8
_EXP = (0.00139261835884, 0.00836317905271, 0.0416665546172, 0.166665769897, 0.5, 1.0, 1.0)


def exp(x: Expr) -> Expr:
    """e^x within 1 ulp; 0 below -87.3 (no denormal results), inf above 88.7, NaN for NaN.

    x = n ln 2 + r with ln 2 in two parts (Cody and Waite), exp(r) by polynomial, times 2^n through the exponent bits.
    """
    x = hold(x)
    low, high = -87.33654, 88.72283
    # comparisons are false for NaN, so it passes through here and makes the polynomial NaN
    inside = hold(T.Select(x < splat(low), splat(low), T.Select(x > splat(high), splat(high), x)))
    n = hold(_unary("llvm.roundeven", inside * splat(1.4426950408889634)))
    r = hold(fma(n, splat(-0.693145751953125), inside))
    r = hold(fma(n, splat(-1.42860682030941723212e-6), r))
    p = _polynomial(r, _EXP)
    # 2^n in two factors, since n = 128 has no single one
    half = hold(T.shift_right(T.Cast("int32x16", n), T.broadcast(T.int32(1), LANES)))
    rest = hold(T.Cast("int32x16", n) - half)
    result = hold(p * _power_of_two(half) * _power_of_two(rest))
    return hold(T.Select(x < splat(low), splat(0.0), T.Select(x > splat(high), splat(float("inf")), result)))


def exp_of_negative(x: Expr) -> Expr:
    """e^x for x <= 0 (or a rounding error above it) within 1 ulp, in half the instructions of `exp`.

    Below -60, where e^x is 8.8e-27, it stays at that: beside the 1 of a softmax that is nothing, and times a small
    scale it is no denormal yet, which would take a hundred times as long. NaN for NaN. Adding 1.5 * 2^23 rounds
    x / ln 2 to an integer n and leaves n in the low bits, which 127 more make the exponent of 2^n.
    """
    low, magic = -60.0, 12582912.0 + 127.0
    x = hold(x)
    x = T.bind(T.Select(splat(low) > x, splat(low), x))
    shifted = T.bind(fma(x, splat(1.4426950408889634), splat(magic)))
    n = T.bind(shifted - splat(magic))
    r = T.bind(fma(n, splat(-0.693145751953125), x))
    r = T.bind(fma(n, splat(-1.42860682030941723212e-6), r))
    bits = T.shift_left(T.reinterpret("int32x16", shifted), T.broadcast(T.int32(23), LANES))
    return T.bind(_polynomial(r, _EXP) * T.reinterpret("float32x16", bits))


def _power_of_two(n: Expr) -> Expr:
    bits = T.shift_left(n + T.broadcast(T.int32(127), LANES), T.broadcast(T.int32(23), LANES))
    return T.reinterpret("float32x16", bits)


def sigmoid(x: Expr) -> Expr:
    """1 / (1 + e^-x), within 2 ulp."""
    return hold(splat(1.0) / (splat(1.0) + exp(splat(0.0) - x)))


# x^3, x^5, ... of tanh below 0.625: S. Moshier, Cephes, tanhf
_TANH = (-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1)


def tanh(x: Expr) -> Expr:
    """tanh x within 2 ulp: an odd polynomial near 0, 1 - 2 / (e^2x + 1) elsewhere."""
    x = hold(x)
    square = hold(x * x)
    near = fma(_polynomial(square, _TANH) * square, x, x)
    size = hold(absolute(x))
    far = hold(splat(1.0) - splat(2.0) / (exp(size + size) + splat(1.0)))
    return hold(T.Select(size < splat(0.625), near, T.Select(x < splat(0.0), splat(0.0) - far, far)))


# N. Juffa's single-precision erff: an odd polynomial below 475/512, 1 - e^P elsewhere
_ERF_NEAR = (-5.96761703e-4, 4.99119423e-3, -2.67681349e-2, 1.12819925e-1, -3.76125336e-1, 1.28379166e-1)
_ERF_FAR = (
    -1.72853470e-5,
    3.83197126e-4,
    -3.88396438e-3,
    2.42546219e-2,
    -1.06777877e-1,
    -6.34846687e-1,
    -1.28717512e-1,
)


def erf(x: Expr) -> Expr:
    """erf x within 2 ulp."""
    x = hold(x)
    size = hold(absolute(x))
    near = fma(_polynomial(x * x, _ERF_NEAR), x, x)
    capped = hold(T.Select(size > splat(4.0), splat(4.0), size))
    far = splat(1.0) - exp(fma(_polynomial(capped, _ERF_FAR), capped, splat(0.0) - capped))
    signed = T.Select(x < splat(0.0), splat(0.0) - far, far)
    return hold(T.Select(size < splat(0.927734375), near, signed))


def silu(x: Expr) -> Expr:
    """x / (1 + e^-x)."""
    x = hold(x)
    return hold(x / (splat(1.0) + exp(splat(0.0) - x)))


def gelu(x: Expr) -> Expr:
    """x/2 (1 + erf(x / sqrt 2))."""
    x = hold(x)
    return hold(splat(0.5) * x * (splat(1.0) + erf(x * splat(0.7071067811865476))))


def gelu_tanh(x: Expr) -> Expr:
    """x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))."""
    x = hold(x)
    inner = fma(x * x * splat(0.044715), x, x) * splat(0.7978845608028654)
    return hold(splat(0.5) * x * (splat(1.0) + tanh(inner)))


def relu(x: Expr) -> Expr:
    """max(x, 0); NaN for NaN."""
    x = hold(x)
    return hold(T.Select(x < splat(0.0), splat(0.0), x))


def relu2(x: Expr) -> Expr:
    """max(x, 0)^2; NaN for NaN."""
    x = relu(x)
    return hold(x * x)


ACTIVATIONS: dict[str, Callable[[Expr], Expr]] = {
    "none": lambda x: x,
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "relu": relu,
    "relu2": relu2,
    "sigmoid": sigmoid,
    "tanh": tanh,
}
"""What a linear layer may apply to its result, by the name in its `act` attribute."""
