"""fuse-epilogue: what is done to a linear's result moves into the linear. Owns bias, activation and residual rules."""

from __future__ import annotations

from dataclasses import dataclass

from xllm_compiler.analysis.weights import is_weight_expr
from xllm_compiler.ir.core import Func, Op, Value
from xllm_compiler.ir.ops import Add, Gelu, Linear, Mul, Pow, Relu, Sigmoid, Silu, Tanh
from xllm_compiler.ir.rewrite import Rewriter, Rule, apply_rules, rule
from xllm_compiler.passes.base import FuncPass, PassContext
from xllm_compiler.passes.fusion.match import activation_of
from xllm_compiler.passes.registry import register_pass


@register_pass("fuse-epilogue")
@dataclass(frozen=True)
class FuseEpilogue(FuncPass):
    """Adds the bias, applies the activation and adds the residual while the linear still has its result in registers.

    before:  %y = nn.linear(%x, %w) : bf16[N, 64]
             %h = t.add(%y, %res)   : bf16[N, 64]
    after:   %h = nn.linear(%x, %w, residual=%res) : bf16[N, 64]

    A parallel block's %x + attention + mlp becomes two linears, each with one residual. Only where the linear has no
    other user, in the order act(x @ w.T + bias) + residual, and never on a partial sum.
    The fused linear rounds once where the separate ops rounded twice. Options choose which of the three are done.
    """

    bias: bool = True
    act: bool = True
    residual: bool = True

    def run_on(self, func: Func, ctx: PassContext) -> bool:
        chosen: list[Rule] = []
        if self.bias:
            chosen.append(linear_bias)
        if self.act:
            chosen.append(linear_act)
        if self.residual:
            chosen += [linear_residual, chain_residuals]
        return apply_rules(func, chosen, self.name, ctx).changed


def _own(v: Value) -> Linear | None:
    """The whole-sum linear that defines `v` for a single user, no residual in it yet."""
    op = v.op
    if isinstance(op, Linear) and v.has_one_use and op.residual is None and not op.partial:
        return op
    return None


def _only_user(v: Value) -> Value | None:
    return v.users[0].result if len(v.users) == 1 and len(v.users[0].results) == 1 else None


@rule(Add)
def linear_bias(op: Add, rw: Rewriter) -> bool:
    for y, bias in ((op.a, op.b), (op.b, op.a)):
        linear = _own(y)
        if linear is None or linear.bias is not None or linear.act != "none" or not is_weight_expr(bias):
            continue
        if bias.dtype != y.dtype or bias.shape != (linear.w.shape[0],):
            continue
        rw.replace(op, rw.create(Linear, linear.x, linear.w, bias=bias))
        return True
    return False


@rule(Silu, Gelu, Relu, Sigmoid, Tanh, Mul, Pow)
def linear_act(op: Op, rw: Rewriter) -> bool:
    found = activation_of(op.result)
    if found is None:
        return False
    name, x = found
    if name == "relu2" and op.operands[0].users != [op]:
        return False
    if name == "relu" and (squared := _only_user(op.result)) is not None and activation_of(squared) == ("relu2", x):
        return False  # goes in as one, from the square
    linear = _own(x)
    if linear is None or linear.act != "none":
        return False
    rw.replace(op, rw.create(Linear, linear.x, linear.w, bias=linear.bias, act=name))
    return True


@rule(Add)
def linear_residual(op: Add, rw: Rewriter) -> bool:
    hosts = [(linear, other) for y, other in ((op.a, op.b), (op.b, op.a)) if (linear := _own(y)) is not None]
    hosts = [(linear, other) for linear, other in hosts if other.type == op.result.type == linear.result.type]
    if not hosts or op.a is op.b:
        return False
    # Of two linears the later one hosts the sum: the other is finished by then.
    linear, other = hosts[0] if len(hosts) == 1 or hosts[1][0].is_before(hosts[0][0]) else hosts[1]
    rw.replace(op, rw.create(Linear, linear.x, linear.w, bias=linear.bias, residual=other, act=linear.act))
    return True


@rule(Add)
def chain_residuals(op: Add, rw: Rewriter) -> bool:
    """(b + a) + other, where linear b holds linear a as its residual: a takes `other` first."""
    for y, other in ((op.a, op.b), (op.b, op.a)):
        outer = y.op
        if not isinstance(outer, Linear) or outer.residual is None or not y.has_one_use:
            continue
        inner = _own(outer.residual)
        if inner is None or other.type != op.result.type or inner.result.type != op.result.type:
            continue
        first = rw.create(Linear, inner.x, inner.w, bias=inner.bias, residual=other, act=inner.act).result
        rw.replace(op, rw.create(Linear, outer.x, outer.w, bias=outer.bias, residual=first, act=outer.act))
        return True
    return False
