"""Idioms of model layers: linears, gates, norms, attention and caches, collectives. Spelled out and as single ops."""

from __future__ import annotations

from itertools import pairwise
from typing import Final

from xllm_compiler.ir import ops
from xllm_compiler.ir.core import Value
from xllm_compiler.testing.sketch import Sketch

_ACTS: Final = ("none", "silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid", "tanh")


# ------------------------------------------------------------------------------------------------------ linears, norms


def _width_to_width(g: Sketch, x: Value, **fields: object) -> Value:
    return g.op(ops.Linear, x, g.param(g.width, g.width), **fields)


def _activation(g: Sketch, x: Value) -> Value:
    return g.op(g.pick((ops.Silu, ops.Gelu, ops.Relu, ops.Sigmoid, ops.Tanh)), x)


def linear(g: Sketch) -> None:
    x = g.back()
    match g.choose(7):
        case 0:
            y = _width_to_width(g, x)
        case 1:
            y = g.op(ops.Add, _width_to_width(g, x), g.back())
        case 2:
            y = g.op(ops.Add, _width_to_width(g, x), g.param(g.width))
        case 3:
            y = _activation(g, _width_to_width(g, x))
        case 4:
            y = _width_to_width(g, x, bias=g.param(g.width), residual=g.back(), act=g.pick(_ACTS))
        case 5:  # a matrix product with a weight
            y = g.op(ops.MatMul, x, g.param(g.width, g.width))
        case _:  # a weight put together from two
            low, high = g.param(1, g.width), g.param(g.width - 1, g.width)
            y = g.op(ops.Linear, x, g.op(ops.Concat, low, high, axis=0))
    g.push(y)


def gated(g: Sketch) -> None:
    """Gate and up: separate, as two halves of one projection, or with another reader, and as one op."""
    x, f = g.back(), 3 + g.choose(4)
    down = g.param(g.width, f)
    match g.choose(6):
        case 0:
            y = g.op(ops.LinearGlu, x, g.param(2 * f, g.width), act=g.pick(_ACTS))
        case 1:
            y = g.op(ops.LinearGlu, x, g.param(2 * f, g.width), g.param(2 * f), act="gelu_tanh")
        case 2:
            biases = (g.param(f), g.param(f) if g.choose(2) else None)
            gate, up = (g.op(ops.Linear, x, g.param(f, g.width), b) for b in biases)
            y = g.op(ops.Mul, _activation(g, gate), up)
        case 3:
            whole = g.op(ops.Linear, x, g.param(2 * f, g.width))
            gate = g.op(ops.Slice, whole, axis=1, start=0, stop=f)
            up = g.op(ops.Slice, whole, axis=1, start=f, stop=2 * f)
            gate, up = (gate, up) if g.choose(2) else (up, gate)
            y = g.op(ops.Mul, _activation(g, gate), up)
        case 4:  # the halves interleaved
            whole = g.op(ops.Linear, x, g.param(2 * f, g.width))
            gate = g.op(ops.Slice, whole, axis=1, start=0, stop=2 * f, step=2)
            up = g.op(ops.Slice, whole, axis=1, start=1, stop=2 * f, step=2)
            y = g.op(ops.Mul, up, _activation(g, gate))
        case _:  # the gate is read twice
            gate = g.op(ops.Linear, x, g.param(f, g.width))
            y = g.op(ops.Mul, _activation(g, gate), g.op(ops.Linear, x, g.param(f, g.width)))
            y = g.op(ops.Add, y, gate)
    g.push(g.settle(g.op(ops.Linear, y, down)))


def norm(g: Sketch) -> None:
    x, w = g.back(), g.width
    eps = g.pick((0.5, 0.125))
    match g.choose(7):
        case 0:
            g.push(g.op(ops.RmsNorm, x, g.param(w), eps=eps, offset=g.pick((0.0, 1.0))))
        case 1:
            g.push(g.op(ops.LayerNorm, x, w=g.param(w), b=g.pick((None, g.param(w))), eps=eps))
        case 2:
            g.stream += g.b.create(ops.AddRmsNorm, x, g.back(), g.param(w), eps=eps).results
        case 3:  # a residual sum that goes on, and its norm
            total = g.op(ops.Add, x, g.back())
            g.push(g.op(ops.Add, g.op(ops.RmsNorm, total, g.param(w), eps=eps), total))
        case 4:  # rms norm as models write it, in f32
            wide = g.op(ops.Cast, x, dtype="f32")
            y = g.op(ops.Mul, wide, g.op(ops.Rsqrt, g.op(ops.Add, _mean_square(g, wide), g.const(eps))))
            scale = g.param(w)
            if g.choose(2):
                scale = g.op(ops.Add, scale, g.const(1.0))
            g.push(g.op(ops.Mul, g.op(ops.Cast, y, dtype=g.dtype), scale))
        case 5:  # layer norm as models write it
            centred = g.op(ops.Sub, x, g.op(ops.Reduce, x, kind="mean", axes=(-1,), keep=True))
            y = g.op(ops.Div, centred, g.op(ops.Sqrt, g.op(ops.Add, _mean_square(g, centred), g.const(eps))))
            g.push(g.op(ops.Add, g.op(ops.Mul, y, g.param(w)), g.param(w)))
        case _:  # per head
            split = g.heads_of(x, g.heads.q, g.heads.v)
            g.push(g.op(ops.Reshape, g.op(ops.RmsNorm, split, g.param(g.heads.v), eps=eps), shape=(g.n, w)))


def _mean_square(g: Sketch, x: Value) -> Value:
    square = g.op(ops.Mul, x, x) if g.choose(2) else g.op(ops.Pow, x, g.const(2.0))
    return g.op(ops.Reduce, square, kind="mean", axes=(-1,), keep=True)


def cross(g: Sketch) -> None:
    """Attention to another sequence, as matrix products; one of fixed length more often than not."""
    rows = g.context() if g.choose(3) == 1 else g.param(5, g.width)
    if rows.op is None and g.choose(2):  # its second half only
        c = rows.shape[0]
        rows = g.op(ops.Slice, rows, axis=0, start=c // 2, stop=c)
    scores = g.op(ops.MatMul, g.back(), g.op(ops.Transpose, rows, perm=(1, 0)))
    scores = g.op(ops.Softmax, g.op(ops.Mul, scores, g.const(0.25)), axis=-1)
    g.push(g.op(ops.MatMul, scores, rows))


# ----------------------------------------------------------------------------------------------------------- attention


def _tables(g: Sketch) -> tuple[Value, Value]:
    """cos and sin [N, R/2] in f32, R at most the size of a key."""
    freq = g.param(max(1, g.choose(g.heads.k // 2) + 1), dtype="f32")
    at = g.op(ops.Reshape, g.op(ops.Cast, g.arg("pos"), dtype="f32"), shape=(g.n, 1))
    angle = g.op(ops.Mul, at, freq)
    return g.op(ops.Cos, angle), g.op(ops.Sin, angle)


def rope(g: Sketch) -> None:
    cos, sin = _tables(g)
    turned = g.op(ops.Rope, g.heads_of(g.back(), g.heads.q, g.heads.k), cos, sin, style=g.pick(("half", "interleaved")))
    if g.heads.k != g.heads.v:
        turned = g.op(ops.Slice, turned, axis=2, start=0, stop=g.heads.v)
    g.push(g.op(ops.Reshape, turned, shape=(g.n, g.width)))


def attention(g: Sketch) -> None:
    """Writes to a cache and reads it; sometimes the version before the write is read too."""
    name, h = g.cache(), g.heads
    before = g.caches[name]
    pos, seq, table = g.arg("pos"), g.arg("seq"), g.arg("table")
    match g.choose(4):
        case 0:
            k, v = g.heads_of(g.back(), h.kv, h.k, "k"), g.heads_of(g.back(), h.kv, h.v, "v")
            q = g.heads_of(g.back(), h.q, h.k, "q")
            old = _attend(g, before, q) if g.choose(4) == 1 else None
            after = g.op(ops.KvWrite, before, k, v, pos, seq, table)
        case 1:  # three projections of one value, rotated
            x, (cos, sin) = g.back(), _tables(g)
            q, k, v = (_project(g, x, *size) for size in ((h.q, h.k), (h.kv, h.k), (h.kv, h.v)))
            style = g.pick(("half", "interleaved"))
            q, k = (g.op(ops.Rope, t, cos, sin, style=style) for t in (q, k))
            old, after = None, g.op(ops.KvWrite, before, k, v, pos, seq, table)
        case 2:  # one projection, cut up, normalised per head
            whole = g.op(ops.Linear, g.back(), g.param(h.q * h.k + h.kv * (h.k + h.v), g.width))
            cuts = (0, h.q * h.k, (h.q + h.kv) * h.k, (h.q + h.kv) * h.k + h.kv * h.v)
            parts = [g.op(ops.Slice, whole, axis=1, start=a, stop=b) for a, b in pairwise(cuts)]
            sizes = ((h.q, h.k), (h.kv, h.k), (h.kv, h.v))
            q, k, v = (g.op(ops.Reshape, p, shape=(g.n, *s)) for p, s in zip(parts, sizes, strict=True))
            if g.choose(2):
                q, k = (g.op(ops.RmsNorm, t, g.param(h.k), eps=0.125) for t in (q, k))
            old, after = None, g.op(ops.KvWrite, before, k, v, pos, seq, table)
        case _:
            whole = g.op(ops.Linear, g.back(), g.param(h.q * h.k + h.kv * (h.k + h.v), g.width))
            turns = _tables(g) if g.choose(2) else (None, None)
            norms = (g.param(h.k), g.param(h.k)) if g.choose(2) else (None, None)
            eps = 0.0 if norms[0] is None else 0.125
            made = g.b.create(ops.KvAppend, before, whole, pos, seq, table, *turns, *norms, q_heads=h.q, eps=eps)
            old, after, q = None, made.results[0], made.results[1]
    g.caches[name] = after
    y = _attend(g, after, q)
    if old is not None:
        y = g.op(ops.Add, y, old)
    g.push(g.op(ops.Reshape, y, shape=(g.n, g.width)))


def _project(g: Sketch, x: Value, heads: int, size: int) -> Value:
    return g.op(ops.Reshape, g.op(ops.Linear, x, g.param(heads * size, g.width)), shape=(g.n, heads, size))


def _attend(g: Sketch, kv: Value, q: Value) -> Value:
    fields: dict[str, object] = {"scale": 0.5}
    if g.choose(3) == 1:
        fields["window"] = 1 + g.choose(5)
    if g.choose(3) == 1:
        fields["softcap"] = 2.0
    if g.choose(3) == 1:
        fields["sinks"] = g.param(g.heads.q)
    return g.op(ops.KvAttend, kv, q, g.arg("pos"), g.arg("seq"), g.arg("start"), g.arg("table"), **fields)


def logits(g: Sketch) -> None:
    """The sampled rows of a value go to the caller."""
    taken = g.op(ops.Take, g.back(), g.arg("sel"), axis=0)
    g.extra.append(g.op(ops.Cast, g.op(ops.Linear, taken, g.param(11, g.width)), dtype="f32"))


# --------------------------------------------------------------------------------------------------------- collectives


def _partial(g: Sketch, group: str) -> Value:
    """A partial sum [N, width]: this rank's columns of a projection."""
    if g.choose(2):
        hidden = g.op(ops.Tanh, g.op(ops.Linear, g.back(), g.param(3, g.width)))
        return g.op(ops.Linear, hidden, g.param(g.width, 3), partial=group)
    return _width_to_width(g, g.back(), partial=group)


def all_reduce(g: Sketch) -> None:
    group = g.group()
    match g.choose(5):
        case 0:
            done = [_reduced(g, group, _partial(g, group))]
        case 1:  # two sums of one shape under way at the same time
            starts = [g.op(ops.AllReduceStart, _partial(g, group), group=group) for _ in range(2)]
            done = [g.op(ops.Wait, f) for f in starts]
        case 2:  # partial sums add up before they are whole
            done = [_reduced(g, group, g.op(ops.Add, _partial(g, group), _partial(g, group)))]
        case 3:  # through what is linear
            part = g.op(ops.Reshape, _partial(g, group), shape=(g.n, g.heads.q, g.heads.v))
            whole = _reduced(g, group, g.op(ops.Transpose, part, perm=(0, 2, 1)))
            done = [g.op(ops.Reshape, g.op(ops.Transpose, whole, perm=(0, 2, 1)), shape=(g.n, g.width))]
        case _:  # the largest of what the ranks hold
            done = [_reduced(g, group, _width_to_width(g, g.back()), kind="max")]
    for y in done:
        g.push(g.settle(g.op(ops.Add, y, g.back()) if g.choose(2) else y))


def _reduced(g: Sketch, group: str, x: Value, **fields: object) -> Value:
    return g.op(ops.Wait, g.op(ops.AllReduceStart, x, group=group, **fields))
