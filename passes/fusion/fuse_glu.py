"""fuse-glu: gate, up, activation and product of a gated MLP in one kernel."""

from __future__ import annotations

from dataclasses import dataclass

from xllm_compiler.ir.core import Func, Value
from xllm_compiler.ir.ops import LinearGlu, Mul
from xllm_compiler.ir.rewrite import Rewriter, apply_rules, rule
from xllm_compiler.passes.base import FuncPass, PassContext
from xllm_compiler.passes.fusion.match import (
    Columns,
    activation_of,
    all_or_none,
    bare_linear,
    columns_of,
    concat_rows,
    only_lead_to,
    same_form,
)
from xllm_compiler.passes.registry import register_pass


@register_pass("fuse-glu")
@dataclass(frozen=True)
class FuseGlu(FuncPass):
    """Turns act(x @ g.T) * (x @ u.T) into nn.linear_glu on the stacked weights.

    before:  %g = nn.linear(%x, %wg) : bf16[N, 96]       after:  %w = t.concat(%wg, %wu, axis=0) : bf16[192, 64]
             %u = nn.linear(%x, %wu) : bf16[N, 96]               %y = nn.linear_glu(%x, %w) : bf16[N, 96]
             %a = t.silu(%g)         : bf16[N, 96]
             %y = t.mul(%a, %u)      : bf16[N, 96]

    Gate and up may also be two slices of one projection, in either order or interleaved: the weight's rows are then
    put in order. Both have a bias or none has; neither is used elsewhere.
    """

    def run_on(self, func: Func, ctx: PassContext) -> bool:
        return apply_rules(func, [gated_product], self.name, ctx).changed


@rule(Mul)
def gated_product(op: Mul, rw: Rewriter) -> bool:
    for gated, up_value in ((op.a, op.b), (op.b, op.a)):
        found = activation_of(gated)
        if found is None or found[1] is up_value or not gated.has_one_use:  # x * sigmoid(x) is no gate
            continue
        act, gate_value = found
        gate, up = _columns(gate_value), _columns(up_value)
        if gate is None or up is None or gate.linear.x is not up.linear.x:
            continue
        if gate_value.users != [gated.op] or up_value.users != [op] or not only_lead_to([gate, up]):
            if rw.ctx is not None:
                rw.ctx.remark(op, "gate or up projection has another user; not fused into linear_glu")
            continue
        if gate_value.shape != up_value.shape or gate_value.dtype != op.result.dtype:
            continue
        if not all_or_none([gate.linear.bias, up.linear.bias]):
            if rw.ctx is not None:
                rw.ctx.remark(op, "only one of gate and up has a bias; not fused into linear_glu")
            continue
        if not same_form([gate.linear.w, up.linear.w]):
            if rw.ctx is not None:
                rw.ctx.remark(op, "gate and up weights are quantized in different forms; not fused into linear_glu")
            continue
        w, bias = _stack(rw, gate, up)
        rw.replace(op, rw.create(LinearGlu, gate.linear.x, w, bias=bias, act=act))
        return True
    return False


def _columns(v: Value) -> Columns | None:
    """`v` [tokens.., F] as a linear's result, or as a slice of the last axis of one."""
    linear = bare_linear(v)
    if linear is not None:
        return Columns(linear, (), v)
    found = columns_of(v)
    return found if found is not None and v.tensor.rank == 2 else None


def _stack(rw: Rewriter, gate: Columns, up: Columns) -> tuple[Value, Value | None]:
    g, u = gate.contiguous, up.contiguous
    if gate.linear is up.linear and g is not None and u is not None and g[1] == u[0]:
        whole = gate.linear.w.shape[0]
        if g[0] == 0 and whole == u[1]:
            return gate.linear.w, gate.linear.bias  # already gate rows, then up rows
    biases = [b for p in (gate, up) if (b := p.bias(rw)) is not None]
    return concat_rows(rw, [gate.weight(rw), up.weight(rw)]), concat_rows(rw, biases) if biases else None
