"""Small questions that canonicalising rules ask of values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from xllm_compiler.ir.core import Op, Value
from xllm_compiler.ir.ops import Cast, Const, Mul, Pow, Slice


def number(v: Value) -> float | None:
    """The value of a float or integer t.const."""
    if not isinstance(v.op, Const) or isinstance(v.op.value, bool):
        return None
    return float(v.op.value)


def close(v: Value, wanted: float) -> bool:
    """Whether `v` is that constant, as far as 32-bit constants in models agree with each other."""
    value = number(v)
    return value is not None and abs(value - wanted) <= 1e-6 * abs(wanted)


def pairs(op: Op) -> Iterator[tuple[Value, Value]]:
    """Both orders of a commutative op's operands."""
    a, b = op.operands
    yield a, b
    yield b, a


def scaled(v: Value, factor: float) -> Value | None:
    """x where v is factor * x."""
    if isinstance(v.op, Mul):
        for x, c in pairs(v.op):
            if close(c, factor):
                return x
    return None


def power(v: Value, exponent: int) -> Value | None:
    """x where v is x ** exponent (2 or 3), spelled with t.pow or as a product."""
    op = v.op
    if isinstance(op, Pow) and number(op.b) == exponent:
        return op.a
    if isinstance(op, Mul):
        if exponent == 2 and op.a is op.b:
            return op.a
        if exponent == 3:
            for a, b in pairs(op):
                if power(a, 2) is b:
                    return b
    return None


def through_cast(v: Value) -> Value:
    """v, or what v is a cast of."""
    return v.op.x if isinstance(v.op, Cast) else v


@dataclass(frozen=True, slots=True)
class Window:
    """`count` elements of base's last axis, from `start` on, every `step`-th."""

    base: Value
    start: int
    count: int
    step: int


def window(v: Value) -> Window | None:
    """v as a slice of the last axis of something that is not such a slice; None where the last axis is symbolic."""
    last = v.tensor.rank - 1
    if last < 0 or not v.shape[last].is_const:
        return None
    op = v.op
    if isinstance(op, Slice) and op.axis == last:
        if not (op.start.is_const and op.stop.is_const):
            return None
        inner = window(op.x)
        if inner is None:
            return None
        start = inner.start + op.start.value * inner.step
        return Window(inner.base, start, v.shape[last].value, inner.step * op.step)
    return Window(v, 0, v.shape[last].value, 1)
