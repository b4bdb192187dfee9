"""KV cache ops. Owns their shape rules and reference meanings; a cache is a state, one version after the other.

Token n of the step has position pos[n] in request seq[n]; table[seq[n], pos[n] // page] is the page of its row.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np

from xllm_compiler.dims import Dim, as_dim, ceildiv, dmin
from xllm_compiler.ir.core import Op, Value
from xllm_compiler.ir.cost import CONTEXT, Cost, CostContext
from xllm_compiler.ir.diag import IrError
from xllm_compiler.ir.facts import Noise, Work
from xllm_compiler.ir.opdef import Operand, OptOperand, op
from xllm_compiler.ir.ops.nn import rotations
from xllm_compiler.ir.rows import ThroughState
from xllm_compiler.ir.semantics import Array, EvalContext, kv_rows, kv_stored, rms_norm, rope
from xllm_compiler.ir.shapes import no_partial, require_float, require_le, require_rank, require_shape
from xllm_compiler.ir.types import DTYPE_BYTES, Kv, Tensor, Type


def _tokens(op: Op, n: Dim, pos: Value, seq: Value, table: Value) -> None:
    for v in (pos, seq):
        if v.dtype != "i32":
            raise IrError(f"{op.name} needs i32 token arrays, %{v.name} is {v.type}")
        require_shape(op.scope, v.shape, [n], f"{op.name}: %{v.name}")
    if table.dtype != "i32" or table.tensor.rank != 2:
        raise IrError(f"{op.name} needs a block table i32[B, T], %{table.name} is {table.type}")


def _same_float(op: Op, kv: Kv, *values: Value) -> None:
    if kv.quantized:
        require_float(op, *values)
        return
    for v in values:
        if v.dtype != kv.dtype:
            raise IrError(f"{op.name}: %{v.name} is {v.type}, the cache holds {kv.dtype}", help="insert t.cast")


def _read_entries(cost: Cost, table: Value, entries: Dim) -> Cost:
    """`cost`, which counts the whole block table, where only `entries` page indices of it are read."""
    return replace(cost, read=cost.read - table.tensor.nbytes + entries * DTYPE_BYTES[table.dtype])


@op("kv.write", consumes="kv")
class KvWrite(Op):
    """kv' = kv with the rows of the step's tokens set to k [N, heads, k_dim] and v [N, heads, v_dim]."""

    rows = ThroughState()
    noise = Noise.MOVES
    work = Work.COPY
    kv: Operand
    k: Operand
    v: Operand
    pos: Operand
    seq: Operand
    table: Operand

    def infer(self) -> tuple[Type, ...]:
        no_partial(self)
        kv = self.kv.kv
        _same_float(self, kv, self.k, self.v)
        require_rank(self, self.k, 3)
        n = self.k.shape[0]
        require_shape(self.scope, self.k.shape, [n, kv.heads, kv.k_dim], "kv.write: k")
        require_shape(self.scope, self.v.shape, [n, kv.heads, kv.v_dim], "kv.write: v")
        _tokens(self, n, self.pos, self.seq, self.table)
        return (kv,)

    def cost(self, ctx: CostContext) -> Cost:
        tokens = self.k.shape[0]
        cost = _read_entries(ctx.count(self, flops=0), self.table, tokens)
        return replace(cost, kv_written=tokens * self.kv.kv.token_bytes)

    def interp(self, ctx: EvalContext, kv: Array, k: Array, v: Array, pos: Array, seq: Array, table: Array) -> Array:
        out = kv.copy()
        rows = kv_rows(self.kv.kv, pos, seq, table)
        out[rows] = np.concatenate([kv_stored(self.kv.kv, ctx.up(x), kv.dtype) for x in (k, v)], axis=-1)
        return out

    def default_hint(self, index: int) -> str:
        return "kv"


@op("kv.attend")
class KvAttend(Op):
    """y[n, h] = softmax over j of (scale * q[n, h] . k[j]) times v[j]; query head h reads kv head h // (Hq / Hk).

    j runs over positions 0..pos[n] of the token's request, the last `window` of them if window > 0. softcap > 0: scores
    become softcap * tanh(score / softcap). sinks [Hq]: one more score per head, with value 0. scratch > 0: a second
    result of so many f32, room to work in; what it holds means nothing.
    """

    rows = ThroughState()
    noise = Noise.ROUNDS
    work = Work.DOT
    kv: Operand
    q: Operand
    pos: Operand
    seq: Operand
    start: Operand
    table: Operand
    sinks: OptOperand
    scale: float
    window: int = 0
    softcap: float = 0.0
    scratch: int = 0

    def infer(self) -> tuple[Type, ...]:
        no_partial(self)
        kv = self.kv.kv
        _same_float(self, kv, self.q)
        require_rank(self, self.q, 3)
        n, heads, _ = self.q.shape
        require_shape(self.scope, self.q.shape, [n, heads, kv.k_dim], "kv.attend: q")
        if not heads.is_const or heads.value % kv.heads:
            raise IrError(f"kv.attend: {heads} query heads over {kv.heads} kv heads")
        _tokens(self, n, self.pos, self.seq, self.table)
        if self.start.dtype != "i32":
            raise IrError(f"kv.attend: start is {self.start.type}, wanted i32[B + 1]")
        require_shape(self.scope, self.start.shape, [self.table.shape[0] + 1], "kv.attend: start")
        if self.sinks is not None:
            require_float(self, self.sinks)
            require_shape(self.scope, self.sinks.shape, [heads], "kv.attend: sinks")
        if self.window < 0 or self.softcap < 0 or self.scratch < 0:
            raise IrError("kv.attend: window, softcap and scratch are at least 0; 0 means none")
        out = Tensor(self.q.dtype, (n, heads, kv.v_dim))
        return (out, Tensor("f32", (self.scratch,))) if self.scratch else (out,)

    def cost(self, ctx: CostContext) -> Cost:
        """Every request's rows are read once. A score costs its dot product, its share of the weighted sum of values,
        and five for scaling and softmax."""
        kv = self.kv.kv
        tokens, heads, _ = self.q.shape
        requests = self.table.shape[0]
        each = ceildiv(tokens, requests)
        length = CONTEXT + each
        pairs = tokens * CONTEXT + tokens * (each + 1) // 2
        if self.window:
            length = dmin(length, self.window - 1 + each)
            pairs = dmin(pairs, tokens * self.window)
        flops = heads * pairs * (2 * kv.k_dim + 2 * kv.v_dim + 5)
        cost = _read_entries(ctx.count(self, flops=flops), self.table, requests * ceildiv(length, kv.page))
        written = self.results[0].tensor.nbytes  # scratch is for few rows, and for them it is small
        return replace(cost, written=written, kv_read=requests * length * kv.token_bytes)

    def interp(
        self,
        ctx: EvalContext,
        kv: Array,
        q: Array,
        pos: Array,
        seq: Array,
        start: Array,
        table: Array,
        sinks: Array | None,
    ) -> Array | tuple[Array, ...]:
        ty = self.kv.kv
        up = ctx.up(q)
        heads = up.shape[1]
        group = heads // ty.heads
        out = np.zeros((*up.shape[:2], ty.v_dim), up.dtype)
        for b in range(len(start) - 1):
            lo, hi = int(start[b]), int(start[b + 1])
            if lo == hi:
                continue
            length = int(pos[lo:hi].max()) + 1
            j = np.arange(length)
            first = max(0, int(pos[lo:hi].min()) - self.window + 1) if self.window else 0
            j = j[first:]
            rows = ctx.up(kv[kv_rows(ty, j, np.full(len(j), b), table)])
            k, v = rows[..., : ty.k_dim], rows[..., ty.k_dim :]
            at = pos[lo:hi].astype(np.int64)[:, None]
            seen = j[None, :] <= at
            if self.window:
                seen &= j[None, :] > at - self.window
            for h in range(heads):
                s = (up[lo:hi, h] @ k[:, h // group].T) * up.dtype.type(self.scale)
                if self.softcap:
                    s = np.tanh(s / up.dtype.type(self.softcap)) * up.dtype.type(self.softcap)
                s = np.where(seen, s, -np.inf).astype(up.dtype)
                top = s.max(axis=1, keepdims=True)
                if sinks is not None:
                    top = np.maximum(top, ctx.up(sinks)[h])
                e = np.exp(s - top)
                total = e.sum(axis=1, keepdims=True)
                if sinks is not None:
                    total = total + np.exp(ctx.up(sinks)[h] - top)
                out[lo:hi, h] = (e @ v[:, h // group]) / total
        return (out, np.zeros(self.scratch, up.dtype)) if self.scratch else out

    def default_hint(self, index: int) -> str:
        return (super().default_hint(0), "scratch")[index]


@op("kv.append", consumes="kv")
class KvAppend(Op):
    """Splits qkv [N, (Hq + Hk) * Dk + Hk * Dv] into q, k, v; normalises q and k per head (qw, kw); rotates them
    (cos, sin); writes k and v. Results (kv', q [N, Hq, Dk]). One rounding, at the results."""

    rows = ThroughState()
    noise = Noise.ROUNDS
    work = Work.LIGHT
    kv: Operand
    qkv: Operand
    pos: Operand
    seq: Operand
    table: Operand
    cos: OptOperand
    sin: OptOperand
    qw: OptOperand
    kw: OptOperand
    q_heads: int
    style: Literal["half", "interleaved"] = "half"
    eps: float = 0.0
    offset: float = 0.0

    def infer(self) -> tuple[Type, ...]:
        no_partial(self)
        kv = self.kv.kv
        _same_float(self, kv, self.qkv)
        require_rank(self, self.qkv, 2)
        n = self.qkv.shape[0]
        if self.q_heads < 1 or self.q_heads % kv.heads:
            raise IrError(f"kv.append: {self.q_heads} query heads over {kv.heads} kv heads")
        width = (self.q_heads + kv.heads) * kv.k_dim + kv.heads * kv.v_dim
        require_shape(self.scope, self.qkv.shape, [n, width], "kv.append: qkv")
        _tokens(self, n, self.pos, self.seq, self.table)
        if (self.cos is None) != (self.sin is None):
            raise IrError("kv.append: cos and sin come together")
        if self.cos is not None and self.sin is not None:
            require_float(self, self.cos, self.sin)
            require_rank(self, self.cos, 2)
            require_shape(self.scope, self.cos.shape, [n, self.cos.shape[1]], "kv.append: cos")
            require_shape(self.scope, self.sin.shape, self.cos.shape, "kv.append: sin")
            require_le(self.scope, 2 * self.cos.shape[1], as_dim(kv.k_dim), "kv.append: rotated part of the head")
        for w in (self.qw, self.kw):
            if w is not None:
                require_float(self, w)
                require_shape(self.scope, w.shape, [kv.k_dim], f"kv.append: %{w.name}")
        return (kv, Tensor(self.qkv.dtype, (n, self.q_heads, kv.k_dim)))

    def cost(self, ctx: CostContext) -> Cost:
        kv, tokens = self.kv.kv, self.qkv.shape[0]
        vectors = tokens * (self.q_heads * (self.qw is not None) + kv.heads * (self.kw is not None))
        flops = 4 * vectors * kv.k_dim + rotations(tokens * (self.q_heads + kv.heads), self.cos)
        cost = _read_entries(ctx.count(self, flops=flops), self.table, tokens)
        return replace(cost, kv_written=tokens * kv.token_bytes)

    def interp(
        self,
        ctx: EvalContext,
        kv: Array,
        qkv: Array,
        pos: Array,
        seq: Array,
        table: Array,
        cos: Array | None,
        sin: Array | None,
        qw: Array | None,
        kw: Array | None,
    ) -> tuple[Array, Array]:
        ty = self.kv.kv
        up, n = ctx.up(qkv), qkv.shape[0]
        split = self.q_heads * ty.k_dim
        q = up[:, :split].reshape(n, self.q_heads, ty.k_dim)
        k = up[:, split : split + ty.heads * ty.k_dim].reshape(n, ty.heads, ty.k_dim)
        v = up[:, split + ty.heads * ty.k_dim :].reshape(n, ty.heads, ty.v_dim)
        if qw is not None:
            q = rms_norm(q, ctx.up(qw), self.eps, self.offset)
        if kw is not None:
            k = rms_norm(k, ctx.up(kw), self.eps, self.offset)
        if cos is not None and sin is not None:
            q = rope(q, ctx.up(cos), ctx.up(sin), self.style)
            k = rope(k, ctx.up(cos), ctx.up(sin), self.style)
        out = kv.copy()
        parts = [kv_stored(ty, x, kv.dtype) for x in (k, v)]
        out[kv_rows(ty, pos, seq, table)] = np.concatenate(parts, axis=-1)
        return out, q

    def default_hint(self, index: int) -> str:
        return ("kv", "q")[index]
