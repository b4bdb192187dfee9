"""Idioms of tensor ops: elementwise, integers and masks, shapes, reductions, look-ups."""

from __future__ import annotations

import math
from typing import Final

from xllm_compiler.ir import ops
from xllm_compiler.ir.clone import clone_op
from xllm_compiler.ir.core import Value
from xllm_compiler.testing.sketch import POSITIONS, Sketch

_UNARY: Final = (
    *(ops.Neg, ops.Abs, ops.Relu, ops.Tanh, ops.Sigmoid, ops.Silu, ops.Gelu),
    *(ops.Erf, ops.Softplus, ops.Sin, ops.Cos),
)
_BINARY: Final = (ops.Add, ops.Sub, ops.Max, ops.Min, ops.Mul)
_COMPARE: Final = (ops.Lt, ops.Le, ops.Gt, ops.Ge, ops.Eq, ops.Ne)


# --------------------------------------------------------------------------------------------------------- elementwise


def unary(g: Sketch) -> None:
    cls = g.pick(_UNARY)
    g.push(g.op(cls, g.back(), tanh=True) if cls is ops.Gelu and g.choose(2) else g.op(cls, g.back()))


def positive(g: Sketch) -> None:
    """Functions with a pole, away from it."""
    size = g.op(ops.Abs, g.back())
    above = g.op(ops.Add, size, g.const(1.0))
    match g.choose(7):
        case 0:
            y = g.op(ops.Exp, g.op(ops.Neg, size))
        case 1:
            y = g.op(ops.Log, above)
        case 2:
            y = g.op(ops.Sqrt, above)
        case 3:
            y = g.op(ops.Rsqrt, above)
        case 4:
            y = g.op(ops.Div, g.back(), above)
        case 5:
            y = g.op(ops.Div, g.const(1.0), g.op(ops.Sqrt, above))
        case _:
            y = g.settle(g.op(ops.Pow, above, g.const(g.pick((2.0, 3.0, 0.5, -0.5, -1.0, 1.0)))))
    g.push(y)


def binary(g: Sketch) -> None:
    cls = g.pick(_BINARY)
    y = g.op(cls, g.back(), g.back())
    g.push(g.settle(y) if cls is ops.Mul else y)


def constant(g: Sketch) -> None:
    """Arithmetic with numbers, those that change nothing among them."""
    cls = g.pick((ops.Add, ops.Mul, ops.Sub, ops.Max, ops.Min))
    neutral = [-math.inf] if cls is ops.Max else [math.inf] if cls is ops.Min else []
    number = g.pick([0.0, 1.0, 0.5, -1.0, 1e-05, *neutral])
    if g.choose(3) == 1:  # computed from numbers, and so no longer a constant that takes the other side's dtype
        one = g.const(1.0, g.dtype)
        c = g.op(ops.Mul, g.const(number, g.dtype), one) if g.choose(2) else g.op(ops.Neg, g.const(-number, g.dtype))
    else:
        c = g.const(number)
    g.push(g.op(cls, *((g.back(), c) if g.choose(2) == 0 else (c, g.back())), hint="same"))


def identity(g: Sketch) -> None:
    """What leaves a value as it is, or does it twice."""
    x = g.back()
    match g.choose(8):
        case 0:
            y = g.op(ops.Neg, g.op(ops.Neg, x))
        case 1:
            y = g.op(ops.Cast, x, dtype=g.dtype)
        case 2:
            y = g.op(ops.Div, x, g.const(1.0))
        case 3:
            y = g.op(ops.Pow, x, g.const(1.0))
        case 4:
            y = g.op(ops.Pad, x, axis=1, lo=0, hi=0)
        case 5:
            y = g.op(ops.Slice, x, axis=0, start=0, stop=g.n)
        case 6:
            y = g.op(ops.Transpose, g.op(ops.Transpose, x, perm=(1, 0)), perm=(1, 0))
        case _:
            y = g.op(ops.Concat, x, axis=0)
    g.push(y)


def again(g: Sketch) -> None:
    """The op that made a value, once more on the same operands."""
    made = g.back().op
    if made is None or not made.SPEC.pure or len(made.results) != 1:
        g.push(g.op(ops.Neg, g.back()))
    else:
        g.stream.append(clone_op(made, g.b, made.operands).result)


def casts(g: Sketch) -> None:
    """To another dtype and back; in between something happens, or nothing."""
    y = g.op(ops.Cast, g.back(), dtype=g.pick(("f32", "f64", "bf16", "f16")))
    if g.choose(2):
        y = g.op(g.pick((ops.Tanh, ops.Silu, ops.Neg)), y)
    g.push(g.op(ops.Cast, y, dtype=g.dtype))


def spelled_activation(g: Sketch) -> None:
    """silu and both gelus as models write them out, and the square of a relu."""
    x = g.back()
    match g.choose(5):
        case 0:
            y = g.op(ops.Mul, x, g.op(ops.Sigmoid, x))
        case 1:  # the quick gelu, which is no silu
            y = g.op(ops.Mul, x, g.op(ops.Sigmoid, g.op(ops.Mul, x, g.const(1.702))))
        case 2:
            inner = g.op(ops.Erf, g.op(ops.Div, x, g.const(2.0**0.5)))
            y = g.op(ops.Mul, g.op(ops.Mul, x, g.const(0.5)), g.op(ops.Add, inner, g.const(1.0)))
        case 3:
            cube = g.op(ops.Mul, g.op(ops.Pow, x, g.const(3.0)), g.const(0.044715))
            inner = g.op(ops.Tanh, g.op(ops.Mul, g.op(ops.Add, x, cube), g.const((2 / 3.141592653589793) ** 0.5)))
            y = g.op(ops.Mul, g.op(ops.Mul, g.const(0.5), x), g.op(ops.Add, g.const(1.0), inner))
        case _:
            half = g.op(ops.Relu, x)
            y = g.settle(g.op(ops.Mul, half, half))
    g.push(y)


# -------------------------------------------------------------------------------------------------- integers and masks


def an_int(g: Sketch) -> Value:
    """i32[N] below POSITIONS."""
    return g.pick(g.ints[:-4:-1]) if g.ints else g.arg("pos")


def integers(g: Sketch) -> None:
    """Arithmetic on positions, brought back into 0..POSITIONS-1."""
    i, c = an_int(g), g.const(1 + g.choose(7), "i32")
    match g.choose(9):
        case 0:
            y = g.op(ops.Add, i, c)
        case 1:
            y = g.op(ops.Mul, i, c)
        case 2:
            y = g.op(ops.FloorDiv, i, c)
        case 3:
            y = g.op(ops.Sub, c, i)
        case 4:
            y = g.op(ops.Max, i, g.arg("seq"))
        case 5:
            y = g.op(ops.Min, g.op(ops.Abs, g.op(ops.Neg, i)), c)
        case 6:
            y = g.op(ops.Clamp, i, lo=1.0, hi=9.0)
        case 7:
            wide = g.pick(("i64", "i8", "u8"))
            y = g.op(ops.Cast, g.op(ops.Cast, i, dtype=wide), dtype="i32")
        case _:
            y = g.op(ops.Cast, g.op(ops.Iota, size=g.n, dtype=g.pick(("i32", "i64"))), dtype="i32")
    g.ints.append(g.op(ops.Mod, y, g.const(POSITIONS, "i32")))
    numbers(g)


def numbers(g: Sketch) -> None:
    """An integer per token becomes a small exact float per token."""
    f = g.op(ops.Mul, g.op(ops.Cast, an_int(g), dtype=g.dtype), g.const(1 / 32))
    if g.choose(3) == 1:
        f = g.op(g.pick((ops.Floor, ops.Neg)), g.op(ops.Mul, f, g.const(8.0)))
        f = g.op(ops.Mod, f, g.const(2.0)) if g.choose(2) else g.op(ops.FloorDiv, f, g.const(16.0))
    g.push(f)


def masks(g: Sketch) -> None:
    """A choice per token, by a comparison or a combination of earlier ones."""
    flag = g.op(g.pick(_COMPARE), an_int(g), g.const(g.choose(5), "i32"))
    if g.flags and g.choose(3):
        flag = g.op(g.pick((ops.And, ops.Or)), flag, g.flags[-1])
    if g.choose(3) == 1:
        flag = g.op(ops.Not, flag)
    g.flags.append(flag)
    match g.choose(3):
        case 0:
            g.push(g.op(ops.Where, g.op(ops.Reshape, flag, shape=(g.n, 1)), g.back(), g.back()))
        case 1:
            g.push(g.op(ops.Where, g.op(ops.Reshape, flag, shape=(g.n, 1)), g.back(), g.const(0.0)))
        case _:
            g.push(g.op(ops.Cast, flag, dtype=g.dtype))


def columns(g: Sketch) -> None:
    """A number per column."""
    count = g.op(ops.Iota, size=g.width, dtype=g.pick(("i32", g.dtype)))
    g.push(g.op(ops.Mul, g.op(ops.Cast, count, dtype=g.dtype), g.const(0.125)))


def returned_ints(g: Sketch) -> None:
    """Integers and flags that the caller gets."""
    if not g.ints and not g.flags:
        integers(g)
    g.extra.append((g.flags or g.ints)[-1])


# -------------------------------------------------------------------------------------------------------------- shapes


def shape(g: Sketch) -> None:
    x, w, h = g.back(), g.width, g.heads
    match g.choose(8):
        case 0:
            split = g.op(ops.Reshape, x, shape=(g.n, h.q, h.v))
            turned = g.op(ops.Transpose, split, perm=(0, 2, 1))
            y = g.op(ops.Reshape, turned, shape=(g.n, w))
        case 1:
            cut = g.choose(w + 1)
            low = g.op(ops.Slice, x, axis=-1, start=0, stop=cut, hint="part")
            high = g.op(ops.Slice, x, axis=-1, start=cut, stop=w, hint="part")
            y = g.op(ops.Concat, *((low, high) if g.choose(2) else (high, low)), axis=1)
        case 2:  # the first half of the tokens; the rest is a constant
            half = g.n // 2
            y = g.op(ops.Pad, g.op(ops.Slice, x, axis=0, start=0, stop=half), axis=0, lo=0, hi=g.n - half, value=1.0)
        case 3:  # all but as many as there are requests
            b = g.requests()
            y = g.op(ops.Pad, g.op(ops.Slice, x, axis=0, start=b, stop=g.n), axis=0, lo=b, hi=0)
        case 4:  # every other column, twice
            even = g.op(ops.Slice, x, axis=1, start=0, stop=w, step=2)
            both = g.op(ops.Concat, even, even, axis=1)
            y = g.op(ops.Slice, both, axis=1, start=0, stop=w)
        case 5:  # one head for all, as grouped queries are spelled
            one = g.op(ops.Slice, x, axis=1, start=0, stop=h.v)
            wide = g.op(ops.Expand, g.op(ops.Reshape, one, shape=(g.n, 1, h.v)), shape=(g.n, h.q, h.v))
            y = g.op(ops.Reshape, wide, shape=(g.n, w))
        case 6:  # a batch axis of 1, as export leaves it
            batch = g.op(ops.Reshape, x, shape=(1, g.n, h.q, h.v))
            turned = g.op(ops.Transpose, batch, perm=(0, 2, 1, 3))
            back = g.op(ops.Transpose, g.op(g.pick((ops.Neg, ops.Tanh)), turned), perm=(0, 2, 1, 3))
            y = g.op(ops.Reshape, back, shape=(g.n, w))
        case _:  # tokens times heads as rows
            rows = g.op(ops.Reshape, x, shape=(g.n * h.q, h.v))
            y = g.op(ops.Reshape, g.op(ops.RmsNorm, rows, g.param(h.v), eps=0.125), shape=(g.n, w))
    g.push(y)


def reduce(g: Sketch) -> None:
    x = g.back()
    match g.choose(5):
        case 0:
            g.push(g.op(ops.Reduce, x, kind=g.pick(("mean", "max", "min")), axes=(-1,), keep=True))
        case 1:
            g.push(g.op(ops.Reduce, x, kind=g.pick(("max", "min")), axes=(1,)))
        case 2:
            g.push(g.settle(g.op(ops.Reduce, x, kind="sum", axes=(-1,), keep=True)))
        case 3:
            g.push(g.op(ops.Softmax, x, axis=g.pick((-1, 0))))
        case _:
            g.push(g.settle(g.op(ops.CumSum, x, axis=1)))


def rows(g: Sketch) -> None:
    """Rows looked up in a table, or in the stream."""
    match g.choose(4):
        case 0:
            g.push(g.op(ops.Embedding, an_int(g), g.param(POSITIONS, g.width)))
        case 1:
            g.push(g.op(ops.Take, g.param(POSITIONS, g.width), an_int(g), axis=0))
        case 2:
            g.push(g.op(ops.Transpose, g.op(ops.Take, g.param(g.width, POSITIONS), an_int(g), axis=1), perm=(1, 0)))
        case _:
            g.push(g.op(ops.Take, g.back(), g.arg("seq"), axis=0))
