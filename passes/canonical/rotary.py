"""Rules that recover nn.rope from the rotary embeddings that models spell out.

Models multiply all of x by tables cos, sin [N, R] in which every value stands twice; nn.rope takes [N, R/2]. A rule
fires only where it can build the short table from how the long one was made, so that the two are equal by
construction.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal

from xllm_compiler.dims import Dim
from xllm_compiler.ir.core import Op, Value
from xllm_compiler.ir.ops import (
    Abs,
    Add,
    Cast,
    Concat,
    Cos,
    Div,
    Exp,
    Expand,
    Mul,
    Neg,
    Reshape,
    Rope,
    Sin,
    Slice,
    Sub,
)
from xllm_compiler.ir.rewrite import Rewriter, Rule, rule
from xllm_compiler.passes.canonical.match import Window, number, pairs, window

Style = Literal["half", "interleaved"]
Plan = Callable[[Rewriter], Value]  # rules may build only once they know that they will fire


# ------------------------------------------------------------------------------------------------------------ tables


def _short(v: Value, n: Dim, half: int, style: Style) -> Plan | None:
    """Builds f32 [N, half] that doubled is v (any shape of N rows of 2 * half); None if that is not certain.

    A rounding of the table to 16 bits is left out: nn.rope takes f32 tables.
    """
    op = v.op
    if op is None or not v.tensor.is_float or v.shape[0] is not n:
        return None
    match op:
        case Reshape():
            return _short(op.x, n, half, style)
        case Cast():
            return _short(op.x, n, half, style)
        case Cos() | Sin() | Neg() | Exp() | Abs():
            inner = _short(op.x, n, half, style)
            return None if inner is None else lambda rw: rw.create(type(op), inner(rw)).result
        case Mul() | Div() | Add() | Sub():
            a, b = op.operands
            if number(b) is not None:
                left = _short(a, n, half, style)
                return None if left is None else lambda rw: rw.create(type(op), left(rw), b).result
            if number(a) is not None:
                right = _short(b, n, half, style)
                return None if right is None else lambda rw: rw.create(type(op), a, right(rw)).result
            return None
        case Concat() if len(op.xs) == 2 and op.xs[0] is op.xs[1] and op.axis == v.tensor.rank - 1:
            # Beside each other: the halves are equal. One after the other in a new last axis: every value twice.
            width = op.xs[0].shape[op.axis]
            beside = width == half
            return _rows(op.xs[0], n, half) if (beside if style == "half" else width == 1) else None
        case Expand() if op.x.tensor.rank == v.tensor.rank:
            grown = [i for i, (a, b) in enumerate(zip(op.x.shape, v.shape, strict=True)) if a is not b]
            if len(grown) != 1 or v.shape[grown[0]] != 2:
                return None
            rest = [d for d in v.shape[grown[0] + 1 :] if d != 1]
            return _rows(op.x, n, half) if rest == ([half] if style == "half" else []) else None
    return None


def _rows(v: Value, n: Dim, half: int) -> Plan | None:
    """Builds v (any shape of N rows of `half`) as f32 [N, half], without its rounding to 16 bits if it has one."""
    if v.shape[0] is not n or v.tensor.elements is not n * half:
        return None

    def build(rw: Rewriter) -> Value:
        x = v
        while isinstance(x.op, (Reshape, Cast)) and x.op.x.tensor.is_float and x.op.x.shape and x.op.x.shape[0] is n:
            x = x.op.x
        if x.tensor.rank != 2:
            x = rw.create(Reshape, x, shape=(n, half)).result
        return x if x.dtype == "f32" else rw.create(Cast, x, dtype="f32").result

    return build


def _is_table(v: Value, x: Value) -> bool:
    """Whether v has one row per token and is shared by all heads of x [N, H, D] (or [N, D])."""
    if v.tensor.rank != x.tensor.rank or v.shape[0] is not x.shape[0]:
        return False
    return x.tensor.rank == 2 or v.shape[1] == 1


# ---------------------------------------------------------------------------------------------------------- rotations


def _halves(first: Value, second: Value) -> tuple[Window, Style] | None:
    """(the whole, style) where `first` and `second` are the two parts that a rotation pairs."""
    a, b = window(first), window(second)
    if a is None or b is None or a.base is not b.base or a.count != b.count or a.step != b.step:
        return None
    if a.step == 1 and b.start == a.start + a.count:
        return Window(a.base, a.start, 2 * a.count, 1), "half"
    if a.step == 2 and b.start == a.start + 1:
        return Window(a.base, a.start, 2 * a.count, 1), "interleaved"
    return None


def _joined(v: Value) -> tuple[Value, Value, Style] | None:
    """(a, b, style) where v is a beside b, or a and b in turns, along the last axis."""
    op = v.op
    if isinstance(op, Concat) and len(op.xs) == 2 and op.axis == v.tensor.rank - 1:
        return op.xs[0], op.xs[1], "half"
    if isinstance(op, Reshape) and isinstance(op.x.op, Concat) and op.x.tensor.rank == v.tensor.rank + 1:
        stacked = op.x.op
        if len(stacked.xs) != 2 or stacked.axis != v.tensor.rank or op.x.shape[: v.tensor.rank - 1] != v.shape[:-1]:
            return None
        parts = [_unstacked(x) for x in stacked.xs]
        if parts[0] is not None and parts[1] is not None:
            return parts[0], parts[1], "interleaved"
    return None


def _unstacked(v: Value) -> Value | None:
    """x [.., h] where v is x [.., h, 1]."""
    if isinstance(v.op, Reshape) and v.shape[-1] == 1 and v.op.x.shape == v.shape[:-1]:
        return v.op.x
    return None


def _rotated(v: Value) -> tuple[Window, Style] | None:
    """(x, style) where v is x with its pairs (a, b) turned into (-b, a)."""
    found = _joined(v)
    if found is None or not isinstance(found[0].op, Neg):
        return None
    whole = _halves(found[1], found[0].op.x)
    return whole if whole is not None and whole[1] == found[2] else None


def _replace(op: Op, whole: Window, cos: Value, sin: Value, style: Style, rw: Rewriter) -> None:
    """op becomes nn.rope of that part of the base; a head axis of size 1 that was dropped comes back for it."""
    x = whole.base
    last = x.tensor.rank - 1
    if x.shape[last] != whole.count:
        x = rw.create(Slice, x, axis=last, start=whole.start, stop=whole.start + whole.count).result
    if x.dtype != op.result.dtype:
        x = rw.create(Cast, x, dtype=op.result.dtype).result
    if x.tensor.rank == 3:
        rw.replace(op, rw.create(Rope, x, cos, sin, style=style))
        return
    x = rw.create(Reshape, x, shape=(x.shape[0], 1, x.shape[1])).result
    y = rw.create(Rope, x, cos, sin, style=style).result
    rw.replace(op, rw.create(Reshape, y, shape=op.result.shape))


def _narrow(v: Value) -> Value:
    """What v was widened from: turning pairs and widening commute, so that tables in f32 widen x and its turn apart."""
    return v.op.x if isinstance(v.op, Cast) and v.dtype == "f32" and v.op.x.dtype in ("bf16", "f16") else v


@rule(Add)
def rotate(op: Add, rw: Rewriter) -> bool:
    """x * cos + rotate(x) * sin, tables of full width."""
    if op.result.tensor.rank not in (2, 3) or not op.result.shape[-1].is_const:
        return False
    for straight, turned in pairs(op):
        if not isinstance(straight.op, Mul) or not isinstance(turned.op, Mul):
            continue
        for r, sin in pairs(turned.op):
            found = _rotated(r) or _rotated(_narrow(r))
            if found is None:
                continue
            whole, style = found
            for x, cos in pairs(straight.op):
                if whole not in (window(x), window(_narrow(x))) or not _is_table(cos, x) or not _is_table(sin, x):
                    continue
                n, half = x.shape[0], whole.count // 2
                short_cos, short_sin = _short(cos, n, half, style), _short(sin, n, half, style)
                if short_cos is None or short_sin is None:
                    continue
                _replace(op, whole, short_cos(rw), short_sin(rw), style, rw)
                return True
    return False


def _product(v: Value, x: Value) -> Value | None:
    """t where v is x * t."""
    if isinstance(v.op, Mul):
        for a, b in pairs(v.op):
            if a is x:
                return b
    return None


@rule(Concat)
def rotate_beside(op: Concat, rw: Rewriter) -> bool:
    """(a cos - b sin) beside (b cos + a sin), tables of half width."""
    return _rotate_parts(op, rw)


@rule(Reshape)
def rotate_in_turns(op: Reshape, rw: Rewriter) -> bool:
    """(a cos - b sin) and (b cos + a sin) in turns, tables of half width."""
    return _rotate_parts(op, rw)


def _rotate_parts(op: Op, rw: Rewriter) -> bool:
    found = _joined(op.result)
    if found is None or op.result.tensor.rank not in (2, 3):
        return False
    first, second, style = found
    if not isinstance(first.op, Sub) or not isinstance(second.op, Add) or not isinstance(first.op.a.op, Mul):
        return False
    for a, cos in pairs(first.op.a.op):
        if not isinstance(first.op.b.op, Mul):
            return False
        for b, sin in pairs(first.op.b.op):
            whole = _halves(a, b)
            if whole is None or whole[1] != style or not _is_table(cos, a) or not _is_table(sin, a):
                continue
            for left, right in pairs(second.op):
                if _product(left, b) is not cos or _product(right, a) is not sin:
                    continue
                n, half = a.shape[0], whole[0].count // 2
                short_cos, short_sin = _rows(cos, n, half), _rows(sin, n, half)
                if short_cos is None or short_sin is None:
                    continue
                _replace(op, whole[0], short_cos(rw), short_sin(rw), style, rw)
                return True
    return False


@rule(Concat)
def partial_rope(op: Concat, rw: Rewriter) -> bool:
    """rope(x[.., :R]) beside x[.., R:]: nn.rope passes the rest through by itself."""
    if len(op.xs) != 2 or op.axis != op.result.tensor.rank - 1:
        return False
    head, rest = op.xs[0], window(op.xs[1])
    if isinstance(head.op, Reshape) and isinstance(head.op.x.op, Rope) and head.op.x.shape[1] == 1:
        rope = head.op.x.op
        start = window(rope.x.op.x) if isinstance(rope.x.op, Reshape) else None
    elif isinstance(head.op, Rope):
        rope, start = head.op, window(head.op.x)
    else:
        return False
    if start is None or rest is None or rest.base is not start.base:
        return False
    if (start.step, rest.step) != (1, 1) or rest.start != start.start + start.count:
        return False
    _replace(op, Window(start.base, start.start, start.count + rest.count, 1), rope.cos, rope.sin, rope.style, rw)
    return True


@rule(Cast)
def rope_cast(op: Cast, rw: Rewriter) -> bool:
    """cast(rope(cast(x))): the op computes in f32 anyway."""
    rope = op.x.op
    if not isinstance(rope, Rope) or not isinstance(rope.x.op, Cast) or rope.x.dtype != "f32":
        return False
    x = rope.x.op.x
    if x.dtype != op.dtype or not x.tensor.is_float:
        return False
    rw.replace(op, rw.create(Rope, x, rope.cos, rope.sin, style=rope.style))
    return True


@rule(Slice)
def slice_of_rounded(op: Slice, rw: Rewriter) -> bool:
    """A slice of a rounded tensor is the rounded slice: brings a table's rounding to where `_rows` leaves it out."""
    rounded = op.x.op
    if not isinstance(rounded, Cast) or rounded.x.dtype != "f32" or op.x.dtype not in ("bf16", "f16"):
        return False
    part = rw.create(Slice, rounded.x, axis=op.axis, start=op.start, stop=op.stop, step=op.step)
    rw.replace(op, rw.create(Cast, part.result, dtype=op.x.dtype))
    return True


RULES: Final[tuple[Rule, ...]] = (slice_of_rounded, rotate, rotate_beside, rotate_in_turns, partial_rope, rope_cast)
