"""Idioms of model layers: linears, gates, norms, attention and caches, collectives. Spelled out and as single ops."""

from __future__ import annotations

from dataclasses import asdict
from itertools import accumulate, pairwise
from typing import Any, Final

from xllm_compiler.ir import ops
from xllm_compiler.ir.core import Op, Value
from xllm_compiler.testing.sketch import Sketch
from xllm_compiler.weight_formats import GRIDS, GridFormat, IntegerFormat

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
        case 6:  # a rotated weight
            w = g.b.create(ops.Rotate, g.param(g.width, g.width), g.pick((None, g.param(g.width))), axis=1).result
            y = g.op(ops.Linear, x, w if w.dtype == g.dtype else g.op(ops.Cast, w, dtype=g.dtype))
        case 1:  # with something in it already, and what may go into it on top
            y = _width_to_width(g, x)
            if g.choose(2):
                bias, residual = g.pick((None, g.param(g.width))), g.pick((None, g.back()))
                y = _width_to_width(g, x, bias=bias, residual=residual, act=g.pick(_ACTS))
            match g.choose(3):
                case 0:
                    y = g.op(ops.Add, y, g.back())
                case 1:
                    y = g.op(ops.Add, y, g.param(g.width))
                case _:
                    y = _activation(g, y)
        case 2:  # two in one sum, and a third on top
            y = g.op(ops.Add, _activation(g, _width_to_width(g, x)), _width_to_width(g, g.back()))
            y = g.op(ops.Add, y, g.back())
        case 3:  # bias, activation, residual
            y = _activation(g, g.op(ops.Add, _width_to_width(g, x), g.param(g.width)))
            y = g.op(ops.Add, y, g.back())
        case 4:  # a matrix product with a weight
            y = g.op(ops.MatMul, x, g.param(g.width, g.width))
        case _:  # a weight put together from two
            low, high = g.param(1, g.width), g.param(g.width - 1, g.width)
            y = g.op(ops.Linear, x, g.op(ops.Concat, low, high, axis=0))
    g.push(y)


def quantized(g: Sketch) -> None:
    """Linear layers on quantized weights: with those alone, or with the argument's rows quantized too (any other value
    would be rounded differently after a rewrite that is off by one unit), and rows of a quantized table."""
    bits, group = g.pick((8, 4)), g.pick((0, 16))
    how = g.choose(4)
    f = 3 + g.choose(4)
    rows = (g.width, g.width, 2 * f, 64)[how]
    grid = g.pick((0, *GRIDS)) if (bits, group) == (8, 0) else 0
    format = GridFormat(grid) if grid else IntegerFormat(bits, group, g.choose(2) == 1)
    stored, scales, *zeros = g.b.create(ops.QuantWeight, g.param(rows, g.width), format=str(format)).results
    fields: dict[str, object] = {"zeros": zeros[0] if zeros else None, "dtype": g.dtype, "format": str(format)}
    if how in (0, 3):
        w = g.op(ops.Dequantize, stored, scales, **fields)
        ids = g.pick(g.ints[:-4:-1]) if g.ints else g.arg("pos")
        g.push(g.op(ops.Linear, g.back(), w) if how == 0 else g.op(ops.Embedding, ids, w))
        return
    grouping: dict[str, Any] = asdict(format.rows)
    match g.choose(3):
        case 0:
            given: Op = g.b.create(ops.QuantRows, g.x, **grouping)
        case 1:
            given = g.b.create(ops.QuantNormRows, g.x, w=g.param(g.width), eps=1e-5, **grouping)
        case _:
            given = g.b.create(ops.QuantNormRows, g.x, b=g.param(g.width), eps=1e-5, kind="layer", **grouping)
    operands = (*given.results, stored, scales)
    fields["bias"] = g.pick((None, g.param(rows)))
    if how == 1:
        g.push(g.op(ops.QuantLinear, *operands, **fields, residual=g.pick((None, g.back())), act=g.pick(_ACTS)))
    else:
        y = g.op(ops.QuantLinearGlu, *operands, **fields, act=g.pick(_ACTS[1:]))
        g.push(g.op(ops.Linear, y, g.param(g.width, f)))


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
        case 3:  # as two parts of one projection, which may have other columns
            lead, gap = g.choose(2), g.choose(2)
            whole = g.op(ops.Linear, x, g.param(lead + f + gap + f, g.width))
            gate = g.op(ops.Slice, whole, axis=1, start=lead, stop=lead + f)
            up = g.op(ops.Slice, whole, axis=1, start=lead + f + gap, stop=lead + f + gap + f)
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


# How a layer's attention may differ from what the fusions know, so that what they take for granted is put to the test.
_ODD: Final = (
    *("", "", "", "v of another input", "one without bias", "k is v", "norms differ", "styles differ"),
    *(
        "tables differ",
        "only q is turned",
        "v is turned",
        "v is normed",
        "q is read before",
        "activated",
        "only k is normed",
    ),
)


def attention(g: Sketch) -> None:
    """Writes to a cache and reads it; sometimes the version before the write is read too."""
    name, h = g.cache(), g.heads
    before = g.states[name]
    pos, seq, table = g.arg("pos"), g.arg("seq"), g.arg("table")
    old: Value | None = None
    match g.choose(4):
        case 0:
            k, v = g.heads_of(g.back(), h.kv, h.k, "k"), g.heads_of(g.back(), h.kv, h.v, "v")
            q = g.heads_of(g.back(), h.q, h.k, "q")
            after = g.op(ops.KvWrite, before, k, v, pos, seq, table)
        case 1:
            whole = g.op(ops.Linear, g.back(), g.param(h.q * h.k + h.kv * (h.k + h.v), g.width))
            turns = _tables(g) if g.choose(2) else (None, None)
            norms = (g.param(h.k), g.param(h.k)) if g.choose(2) else (None, None)
            eps = 0.0 if norms[0] is None else 0.125
            made = g.b.create(ops.KvAppend, before, whole, pos, seq, table, *turns, *norms, q_heads=h.q, eps=eps)
            after, q = made.results
        case _:
            odd = g.pick(_ODD)
            q, k, v = _turned(g, _normed(g, _projected(g, odd), odd), odd)
            if odd == "q is read before":
                old = _attend(g, before, q)
            after = g.op(ops.KvWrite, before, k, v, pos, seq, table)
    g.states[name] = after
    y = _attend(g, after, q)
    if old is not None:
        y = g.op(ops.Add, y, old)
    g.push(g.op(ops.Reshape, y, shape=(g.n, g.width)))


def _projected(g: Sketch, odd: str) -> list[Value]:
    """q, k and v [N, heads, size]: the columns of one projection, or three of one value."""
    h = g.heads
    sizes = ((h.q, h.k), (h.kv, h.k), (h.kv, h.v))
    widths = [heads * size for heads, size in sizes]
    x, act, biased = g.back(), "relu" if odd == "activated" else "none", g.choose(2) == 1
    if g.choose(2):
        bias = g.param(sum(widths)) if biased else None
        whole = g.op(ops.Linear, x, g.param(sum(widths), g.width), bias, act=act)
        cuts = (0, *accumulate(widths))
        parts = [g.op(ops.Slice, whole, axis=1, start=a, stop=b) for a, b in pairwise(cuts)]
    else:
        parts = []
        for i, width in enumerate(widths):
            source = g.op(ops.Tanh, x) if odd == "v of another input" and i == 2 else x
            bias = g.param(width) if biased != (odd == "one without bias" and i == 1) else None
            parts.append(g.op(ops.Linear, source, g.param(width, g.width), bias, act=act))
    if odd == "k is v" and h.k == h.v:
        parts[1] = parts[2]
    return [g.op(ops.Reshape, p, shape=(g.n, *size)) for p, size in zip(parts, sizes, strict=True)]


def _normed(g: Sketch, parts: list[Value], odd: str) -> list[Value]:
    q, k, v = parts
    if odd == "v is normed":
        v = g.op(ops.RmsNorm, v, g.param(g.heads.v), eps=0.125)
    if odd in ("norms differ", "only k is normed") or g.choose(3) == 1:
        eps, offset = g.pick(((0.125, 0.0), (0.125, 1.0)))
        other = g.pick((0.5, 0.125)), (1.0 - offset if g.choose(2) else offset)
        k_eps, k_offset = other if odd == "norms differ" else (eps, offset)
        k = g.op(ops.RmsNorm, k, g.param(g.heads.k), eps=k_eps, offset=k_offset)
        if odd != "only k is normed":
            q = g.op(ops.RmsNorm, q, g.param(g.heads.k), eps=eps, offset=offset)
    return [q, k, v]


def _turned(g: Sketch, parts: list[Value], odd: str) -> list[Value]:
    q, k, v = parts
    if "turned" not in odd and odd not in ("styles differ", "tables differ") and not g.choose(2):
        return parts
    (cos, sin), styles = _tables(g), ["half", "interleaved"]
    style = g.pick(styles)
    styles.remove(style)
    q = g.op(ops.Rope, q, cos, sin, style=style)
    if odd != "only q is turned":
        k_sin = g.op(ops.Neg, sin) if odd == "tables differ" else sin
        k = g.op(ops.Rope, k, cos, k_sin, style=styles[0] if odd == "styles differ" else style)
    if odd == "v is turned" and 2 * cos.shape[1].value <= g.heads.v:
        v = g.op(ops.Rope, v, cos, sin, style=style)
    return [q, k, v]


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
    rows = g.op(ops.Cast, g.op(ops.Linear, taken, g.param(11, g.width)), dtype="f32")
    g.extra.append(rows)
    if g.choose(3) == 1:
        g.extra.append(g.op(ops.BlockMax, rows, block=g.pick((4, 64))))


# --------------------------------------------------------------------------------------------------------- collectives


def _partial(g: Sketch, group: str) -> Value:
    """A partial sum [N, width]: this rank's columns of a projection."""
    if g.choose(2):
        hidden = g.op(ops.Tanh, g.op(ops.Linear, g.back(), g.param(3, g.width)))
        return g.op(ops.Linear, hidden, g.param(g.width, 3), partial=group)
    return _width_to_width(g, g.back(), partial=group)


def collective(g: Sketch) -> None:
    group = g.group()
    ranks = g.module.groups[group].size
    wide = ranks * g.width
    match g.choose(12):
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
        case 4 | 5:  # the largest of what the ranks hold
            done = [_reduced(g, group, _width_to_width(g, g.back()), kind="max")]
        case 6:  # all tokens of all ranks
            rows = _exchanged(g, ops.AllGatherStart, group, _width_to_width(g, g.back()), axis=0)
            done = [_mean_of(g, rows, ranks)]
        case 7:  # all columns of all ranks
            columns = _exchanged(g, ops.AllGatherStart, group, _width_to_width(g, g.back()), axis=1)
            done = [g.op(ops.Linear, columns, g.param(g.width, wide))]
        case 8:  # this rank's columns of a sum
            part = g.op(ops.Linear, g.back(), g.param(wide, g.width), partial=group)
            done = [_exchanged(g, ops.ReduceScatterStart, group, part, axis=1)]
        case 9:  # columns for rows, and columns for columns
            columns = g.op(ops.Linear, g.back(), g.param(wide, g.width))
            done = [_mean_of(g, _exchanged(g, ops.AllToAllStart, group, columns, split=1, concat=0), ranks)]
        case 10:
            columns = g.op(ops.Linear, g.back(), g.param(wide, g.width))
            mixed = _exchanged(g, ops.AllToAllStart, group, columns, split=1, concat=1)
            done = [g.op(ops.Linear, mixed, g.param(g.width, wide))]
        case _:
            done = [_exchanged(g, ops.BroadcastStart, group, _width_to_width(g, g.back()), root=g.choose(ranks))]
    for y in done:
        own = y if y.dtype == g.dtype else g.op(ops.Cast, y, dtype=g.dtype)
        g.push(g.settle(g.op(ops.Add, own, g.back()) if g.choose(2) else own))


def _exchanged(g: Sketch, cls: type[Op], group: str, x: Value, **fields: object) -> Value:
    return g.op(ops.Wait, g.op(cls, x, group=group, **fields))


def _reduced(g: Sketch, group: str, x: Value, **fields: object) -> Value:
    return _exchanged(g, ops.AllReduceStart, group, x, **fields)


def _mean_of(g: Sketch, rows: Value, ranks: int) -> Value:
    """[N, width] from the rows of all ranks."""
    by_rank = g.op(ops.Reshape, rows, shape=(ranks, g.n, g.width))
    return g.op(ops.Reduce, by_rank, kind="mean", axes=(0,), keep=False)
