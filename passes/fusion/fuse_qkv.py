"""fuse-qkv: the query, key and value projections of one attention in one linear."""

from __future__ import annotations

from dataclasses import dataclass

from xllm_compiler.ir.core import Func, Value
from xllm_compiler.ir.ops import KvAttend, KvWrite, Linear, Reshape, RmsNorm, Rope, Slice
from xllm_compiler.ir.rewrite import Rewriter, apply_rules, rule
from xllm_compiler.passes.base import FuncPass, PassContext
from xllm_compiler.passes.fusion.match import (
    Columns,
    all_or_none,
    columns_of,
    concat_rows,
    hoist,
    only_lead_to,
    same_form,
)
from xllm_compiler.passes.registry import register_pass


@register_pass("fuse-qkv")
@dataclass(frozen=True)
class FuseQkv(FuncPass):
    """Stacks the weights of the linears that feed one kv.write and its kv.attend, and slices the result.

    before:  %q = nn.linear(%x, %wq) : bf16[N, 128]      after:  %w = t.concat(%wq, %wk, %wv, axis=0) : bf16[256, 64]
             %k = nn.linear(%x, %wk) : bf16[N, 64]               %qkv = nn.linear(%x, %w) : bf16[N, 256]
             %v = nn.linear(%x, %wv) : bf16[N, 64]               %q = t.slice(%qkv, axis=1, start=0, stop=128) : ..
             ..                                                  %k = t.slice(%qkv, axis=1, start=128, stop=192) : ..

    Found by use in attention, behind per-head norms and rotary, not by a shared input alone: the MLP of a parallel
    block reads the same x and is no part of it. The parts may also be slices of one projection in any order, say
    interleaved by head: the weight's rows are put into the order q, k, v, which is what fuse-kv-append wants.
    """

    def run_on(self, func: Func, ctx: PassContext) -> bool:
        return apply_rules(func, [stack_projections], self.name, ctx).changed


def _projection(v: Value) -> Columns | None:
    """The columns of a linear from which `v` [N, heads, dim] comes by rotary and per-head norm."""
    if isinstance(v.op, Rope):
        v = v.op.x
    if isinstance(v.op, RmsNorm) and v.tensor.rank == 3:
        v = v.op.x
    return columns_of(v)


@rule(KvWrite)
def stack_projections(op: KvWrite, rw: Rewriter) -> bool:
    k, v = _projection(op.k), _projection(op.v)
    if k is None or v is None:
        return False
    queries = [_projection(u.q) for u in op.result.users if isinstance(u, KvAttend)]
    q = next((c for c in queries if c is not None and c.linear.x is k.linear.x), None)
    if q is None:
        return False
    parts = (q, k, v)
    if _in_order(parts):
        return False
    why = ""
    if v.linear.x is not k.linear.x:
        why = "keys and values are projected from different inputs"
    elif k.linear is v.linear and (k.value is v.value or (k.contiguous is not None and k.contiguous == v.contiguous)):
        why = "keys and values are the same projection"
    elif not all_or_none([p.linear.bias for p in parts]):
        why = "some of the projections have a bias and some have none"
    elif not same_form([p.linear.w for p in parts]):
        why = "their weights are quantized in different forms"
    elif not only_lead_to(parts):
        why = "a projection is used outside this attention"
    if why:
        if rw.ctx is not None:
            rw.ctx.remark(op, f"q, k and v are not stacked: {why}")
        return False
    linears = [p.linear for p in parts]
    first = min(linears, key=op.func.ops.order)
    hoist([w for linear in linears for w in (linear.w, linear.bias)], first)
    rw.before(first)
    w = concat_rows(rw, [p.weight(rw) for p in parts])
    biases = [b for p in parts if (b := p.bias(rw)) is not None]
    bias = concat_rows(rw, biases) if biases else None
    stacked = rw.create(Linear, first.x, w, bias=bias, hint="qkv").result
    at = 0
    for p in parts:
        size = _width(p)
        part = rw.create(Slice, stacked, axis=1, start=at, stop=at + size).result
        if p.value.tensor.rank > 2:
            part = rw.create(Reshape, part, shape=p.value.shape).result
        rw.replace_value(p.value, part)
        at += size
    for p in parts:
        if p.value.op is not None and p.value.op.attached:
            rw.erase(p.value.op)  # what led to it dies with it
    return True


def _width(p: Columns) -> int:
    return p.value.tensor.with_(shape=p.value.shape[1:]).elements.value


def _in_order(parts: tuple[Columns, ...]) -> bool:
    """Whether the parts already are the consecutive columns of one linear, all of them."""
    at = 0
    for p in parts:
        if p.linear is not parts[0].linear or p.contiguous != (at, at + _width(p)):
            return False
        at += _width(p)
    return parts[0].linear.w.shape[0] == at
