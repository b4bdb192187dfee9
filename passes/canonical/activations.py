"""Rules that recover activations and powers from how models spell them out."""

from __future__ import annotations

import math
from typing import Final

from xllm_compiler.ir.core import Value
from xllm_compiler.ir.ops import Add, Div, Erf, Gelu, Mul, Pow, Rsqrt, Sigmoid, Silu, Sqrt, Tanh
from xllm_compiler.ir.rewrite import Rewriter, Rule, rule
from xllm_compiler.passes.canonical.match import close, number, pairs, power, scaled


@rule(Mul)
def silu(op: Mul, rw: Rewriter) -> bool:
    """x * sigmoid(x)."""
    for x, s in pairs(op):
        if isinstance(s.op, Sigmoid) and s.op.x is x:
            rw.replace(op, rw.create(Silu, x))
            return True
    return False


def _one_plus(v: Value) -> Value | None:
    """x where v is 1 + x."""
    if isinstance(v.op, Add):
        for x, c in pairs(v.op):
            if number(c) == 1:
                return x
    return None


def _tanh_argument(v: Value) -> Value | None:
    """x where v is sqrt(2/pi) * (x + 0.044715 * x^3)."""
    inner = scaled(v, math.sqrt(2 / math.pi))
    if inner is None:
        return None
    if isinstance(inner.op, Add):
        for x, cubic in pairs(inner.op):
            cube = scaled(cubic, 0.044715)
            if cube is not None and power(cube, 3) is x:
                return x
    if isinstance(inner.op, Mul):  # x * (1 + 0.044715 * x * x)
        for x, rest in pairs(inner.op):
            quadratic = _one_plus(rest)
            if quadratic is None or not isinstance(quadratic.op, Mul):
                continue
            for part, other in pairs(quadratic.op):
                square = scaled(quadratic, 0.044715)
                if (square is not None and power(square, 2) is x) or (scaled(part, 0.044715) is x and other is x):
                    return x
    return None


def _erf_argument(v: Value) -> Value | None:
    """x where v is x / sqrt(2)."""
    if isinstance(v.op, Div) and close(v.op.b, math.sqrt(2)):
        return v.op.a
    return scaled(v, math.sqrt(0.5))


@rule(Mul)
def gelu(op: Mul, rw: Rewriter) -> bool:
    """0.5 * x * (1 + tanh(..)) or (1 + erf(..)), however the three factors are grouped."""
    for factors in _factors(op):
        for i, v in enumerate(factors):
            inner = _one_plus(v)
            rest = [f for j, f in enumerate(factors) if j != i]
            if inner is None or not any(close(f, 0.5) for f in rest):
                continue
            others = [f for f in rest if not close(f, 0.5)]
            if len(others) != 1:
                continue
            x = others[0]
            if isinstance(inner.op, Tanh) and _tanh_argument(inner.op.x) is x:
                rw.replace(op, rw.create(Gelu, x, tanh=True))
                return True
            if isinstance(inner.op, Erf) and _erf_argument(inner.op.x) is x:
                rw.replace(op, rw.create(Gelu, x))
                return True
    return False


def _factors(op: Mul) -> list[tuple[Value, Value, Value]]:
    """The three factors of a product of a product, for either grouping."""
    out = []
    for a, b in pairs(op):
        if isinstance(a.op, Mul):
            out.append((a.op.a, a.op.b, b))
    return out


@rule(Pow)
def small_power(op: Pow, rw: Rewriter) -> bool:
    """x ** 2, 3, 0.5, -0.5, -1 without t.pow."""
    exponent, x = number(op.b), op.a
    if not x.tensor.is_float or op.result.type != x.type:
        return False
    if exponent in (2.0, 3.0):
        square = rw.create(Mul, x, x)
        rw.replace(op, square if exponent == 2 else rw.create(Mul, square.result, x))
    elif exponent == 0.5:
        rw.replace(op, rw.create(Sqrt, x))
    elif exponent == -0.5:
        rw.replace(op, rw.create(Rsqrt, x))
    else:
        return False
    return True


RULES: Final[tuple[Rule, ...]] = (silu, gelu)
LATE_RULES: Final[tuple[Rule, ...]] = (small_power,)
