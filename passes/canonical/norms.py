"""Rules that recover nn.rms_norm and nn.layer_norm from how models spell them out."""

from __future__ import annotations

from typing import Final

from xllm_compiler.analysis.weights import is_weight_expr
from xllm_compiler.ir.core import Op, Value
from xllm_compiler.ir.ops import Add, Cast, Div, LayerNorm, Mul, Pow, Reduce, RmsNorm, Rsqrt, Sqrt, Sub
from xllm_compiler.ir.rewrite import Rewriter, Rule, rule
from xllm_compiler.passes.canonical.match import number, pairs, power


def _last_mean(v: Value) -> Value | None:
    """x where v is the mean of x over its last axis, kept."""
    op = v.op
    if isinstance(op, Reduce) and op.kind == "mean" and op.keep and op.axes == (op.x.tensor.rank - 1,):
        return op.x
    return None


def _mean_square_eps(v: Value) -> tuple[Value, float] | None:
    """(x, eps) where v is mean(x^2) + eps."""
    if not isinstance(v.op, Add):
        return None
    for m, c in pairs(v.op):
        eps, squares = number(c), _last_mean(m)
        if eps is not None and squares is not None:
            x = power(squares, 2)
            if x is not None:
                return x, eps
    return None


def _inverse_rms(v: Value) -> tuple[Value, float] | None:
    """(x, eps) where v is 1 / sqrt(mean(x^2) + eps)."""
    op = v.op
    if isinstance(op, Rsqrt):
        return _mean_square_eps(op.x)
    if isinstance(op, Pow) and number(op.b) == -0.5:
        return _mean_square_eps(op.a)
    if isinstance(op, Div) and number(op.a) == 1 and isinstance(op.b.op, Sqrt):
        return _mean_square_eps(op.b.op.x)
    return None


@rule(Mul)
def rms_norm(op: Mul, rw: Rewriter) -> bool:
    """x * rsqrt(mean(x^2) + eps)."""
    for x, r in pairs(op):
        found = _inverse_rms(r)
        if found is not None and found[0] is x:
            rw.replace(op, rw.create(RmsNorm, x, eps=found[1]))
            return True
    return False


@rule(Div)
def rms_norm_div(op: Div, rw: Rewriter) -> bool:
    """x / sqrt(mean(x^2) + eps)."""
    root = op.b.op
    found = _mean_square_eps(root.x) if isinstance(root, Sqrt) else None
    if found is None or found[0] is not op.a:
        return False
    rw.replace(op, rw.create(RmsNorm, op.a, eps=found[1]))
    return True


@rule(RmsNorm)
def layer_norm(op: RmsNorm, rw: Rewriter) -> bool:
    """rms_norm(x - mean(x)) is layer_norm(x)."""
    centred = op.x.op
    if not isinstance(centred, Sub) or op.offset or _last_mean(centred.b) is not centred.a:
        return False
    rw.replace(op, rw.create(LayerNorm, centred.a, w=op.w, eps=op.eps))
    return True


def _vector(v: Value, x: Value) -> bool:
    """Whether v is a weight [last axis of x]."""
    return v.tensor.rank == 1 and v.shape[0] is x.shape[-1] and v.tensor.is_float and is_weight_expr(v)


def _weight_and_offset(v: Value) -> tuple[Value, float]:
    """(w, c) where v is w + c."""
    if isinstance(v.op, Add):
        for w, c in pairs(v.op):
            offset = number(c)
            if offset is not None and w.tensor.rank == 1:
                return w, offset
    return v, 0.0


def _uncast(v: Value) -> Value:
    """A weight that was only widened: norms take weights of any float dtype and compute in f32."""
    return v.op.x if isinstance(v.op, Cast) and v.dtype == "f32" and v.op.x.tensor.is_float else v


@rule(Mul)
def norm_weight(op: Mul, rw: Rewriter) -> bool:
    """norm(x) * w, norm(x) * (1 + w)."""
    for n, v in pairs(op):
        norm = n.op
        if not isinstance(norm, (RmsNorm, LayerNorm)) or norm.w is not None or not _vector(v, n):
            continue
        if isinstance(norm, LayerNorm) and norm.b is not None:
            continue
        if v.dtype != n.dtype:
            continue
        if isinstance(norm, RmsNorm):
            w, offset = _weight_and_offset(_uncast(v))
            rw.replace(op, rw.create(RmsNorm, norm.x, _uncast(w), eps=norm.eps, offset=offset))
        else:
            rw.replace(op, rw.create(LayerNorm, norm.x, _uncast(v), eps=norm.eps))
        return True
    return False


@rule(Add)
def norm_bias(op: Add, rw: Rewriter) -> bool:
    """layer_norm(x, w) + b."""
    for n, v in pairs(op):
        norm = n.op
        if isinstance(norm, LayerNorm) and norm.b is None and _vector(v, n) and n.has_one_use:
            rw.replace(op, rw.create(LayerNorm, norm.x, norm.w, _uncast(v), eps=norm.eps))
            return True
    return False


@rule(Cast)
def norm_cast(op: Cast, rw: Rewriter) -> bool:
    """cast(norm(cast(x))): the op computes in f32 anyway and rounds once."""
    norm = op.x.op
    if not isinstance(norm, (RmsNorm, LayerNorm)) or not isinstance(norm.x.op, Cast):
        return False
    x = norm.x.op.x
    if x.dtype != op.dtype or norm.x.dtype != "f32" or x.dtype not in ("bf16", "f16"):
        return False
    if isinstance(norm, RmsNorm):
        made: Op = rw.create(RmsNorm, x, norm.w, eps=norm.eps, offset=norm.offset)
    else:
        made = rw.create(LayerNorm, x, norm.w, norm.b, eps=norm.eps)
    rw.replace(op, made)
    return True


RULES: Final[tuple[Rule, ...]] = (rms_norm, rms_norm_div, layer_norm, norm_cast, norm_weight, norm_bias)
