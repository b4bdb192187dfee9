"""fuse-kv-append: from the stacked projection to the cache in one kernel."""

from __future__ import annotations

from dataclasses import dataclass

from xllm_compiler.analysis.weights import is_weight_expr
from xllm_compiler.ir.core import Func, Op, Value
from xllm_compiler.ir.ops import KvAppend, KvAttend, KvWrite, RmsNorm, Rope
from xllm_compiler.ir.rewrite import Rewriter, apply_rules, rule
from xllm_compiler.passes.base import FuncPass, PassContext
from xllm_compiler.passes.fusion.match import columns_of, hoist
from xllm_compiler.passes.registry import register_pass


@register_pass("fuse-kv-append")
@dataclass(frozen=True)
class FuseKvAppend(FuncPass):
    """Splits, normalises, rotates and writes in one pass over the projection's result.

    before:  %q0 = t.slice(%qkv, axis=1, start=0, stop=128), reshaped to [N, 8, 16]; %k0, %v0 likewise
             %q = nn.rope(%q0, %cos, %sin) : bf16[N, 8, 16]
             %k = nn.rope(%k0, %cos, %sin) : bf16[N, 4, 16]
             %kv1 = kv.write(%kv, %k, %v0, %pos, %seq, %table) : kv<..>
             %a = kv.attend(%kv1, %q, ..)
    after:   %kv1, %q = kv.append(%kv, %qkv, %pos, %seq, %table, cos=%cos, sin=%sin, q_heads=8) : kv<..>, bf16[N, 8, 16]
             %a = kv.attend(%kv1, %q, ..)

    A per-head RMS norm of q, of k, of both or of none comes before the rotation, which may be partial or absent. Other
    arrangements (q and k rotated differently, norms after the rotation, parts that are not the columns q, k, v of one
    linear) stay as they are, with a remark.
    """

    def run_on(self, func: Func, ctx: PassContext) -> bool:
        return apply_rules(func, [append], self.name, ctx).changed


@dataclass(frozen=True, slots=True)
class _Head:
    """One of q, k, v: columns start..stop of `qkv`, optionally normalised, then rotated."""

    qkv: Value
    start: int
    stop: int
    norm: RmsNorm | None
    rope: Rope | None


def _head(v: Value) -> _Head | None:
    rope = v.op if isinstance(v.op, Rope) else None
    v = rope.x if rope is not None else v
    norm = v.op if isinstance(v.op, RmsNorm) else None
    v = norm.x if norm is not None else v
    columns = columns_of(v) if v.tensor.rank == 3 else None
    place = None if columns is None else columns.contiguous
    return None if columns is None or place is None else _Head(columns.linear.result, *place, norm, rope)


@rule(KvWrite)
def append(op: KvWrite, rw: Rewriter) -> bool:
    queries: list[Value] = []
    for user in op.result.users:
        if isinstance(user, KvAttend) and user.q not in queries:
            queries.append(user.q)
    heads = (_head(queries[0]) if len(queries) == 1 else None, _head(op.k), _head(op.v))
    q, k, v = heads
    if q is None or k is None or v is None:
        which = ", ".join(n for n, h in zip("qkv", heads, strict=True) if h is None)
        return _leave(op, rw, f"{which} not found as columns of one linear, normalised and rotated per head")
    why = _misfit(op, queries[0], q, k, v)
    if why:
        return _leave(op, rw, why)
    norm = q.norm or k.norm
    hoist([h.norm.w for h in (q, k) if h.norm is not None], op)
    fused = rw.create(
        KvAppend,
        op.kv,
        q.qkv,
        op.pos,
        op.seq,
        op.table,
        cos=q.rope.cos if q.rope is not None else None,
        sin=q.rope.sin if q.rope is not None else None,
        qw=q.norm.w if q.norm is not None else None,
        kw=k.norm.w if k.norm is not None else None,
        q_heads=queries[0].shape[1].value,
        style=q.rope.style if q.rope is not None else "half",
        eps=norm.eps if norm is not None else 0.0,
        offset=norm.offset if norm is not None else 0.0,
        hint=(op.result.name, queries[0].name),
    )
    dead = queries[0].op
    rw.replace_value(queries[0], fused.results[1])
    rw.replace(op, fused.results[0])
    if dead is not None and not queries[0].has_uses:
        rw.erase(dead)
    return True


def _misfit(op: KvWrite, query: Value, q: _Head, k: _Head, v: _Head) -> str:
    """Why kv.append cannot express this, or "" when it can."""
    kv = op.kv.kv
    width = q.qkv.shape[1]
    if not (q.qkv is k.qkv is v.qkv and q.start == 0 and q.stop == k.start and k.stop == v.start and width == v.stop):
        return "q, k and v are not the consecutive columns of one linear"
    if v.norm is not None or v.rope is not None:
        return "values are normalised or rotated"
    if (q.qkv.dtype != kv.dtype and not kv.quantized) or query.shape[2] != kv.k_dim or not query.shape[1].is_const:
        return f"q is {query.type} and the cache holds {kv}"
    norms = [h.norm for h in (q, k) if h.norm is not None]
    if any(n.w is None or not is_weight_expr(n.w) for n in norms):
        return "a norm of q or k has no fixed weight"
    if len({(n.eps, n.offset) for n in norms}) > 1:
        return "the norms of q and k differ in eps or offset"
    if (q.rope is None) != (k.rope is None):
        return "only one of q and k is rotated"
    if q.rope is not None and k.rope is not None:
        if q.rope.cos is not k.rope.cos or q.rope.sin is not k.rope.sin or q.rope.style != k.rope.style:
            return "q and k are rotated differently"
        if q.rope.cos.shape[0] is not query.shape[0]:
            return f"one rotation for all tokens: cos is {q.rope.cos.type}"
    if any(not op.is_before(user) for user in query.users):
        return "q is used before keys and values are written"
    return ""


def _leave(op: Op, rw: Rewriter, why: str) -> bool:
    if rw.ctx is not None:
        rw.ctx.remark(op, f"not fused into kv.append: {why}")
    return False
