"""Passes that do what tests of the harness need: change the meaning, remark, blame. Loaded by path, from RUN lines."""

from __future__ import annotations

from dataclasses import dataclass

from xllm_compiler.ir.core import Func
from xllm_compiler.ir.diag import blame
from xllm_compiler.ir.ops import Abs, Exp, Neg
from xllm_compiler.ir.rewrite import Rewriter, apply_rules, rule
from xllm_compiler.passes.base import FuncPass, PassContext
from xllm_compiler.passes.registry import register_pass


@rule(Neg)
def neg_to_abs(op: Neg, rw: Rewriter) -> bool:
    rw.replace(op, rw.create(Abs, op.x))
    return True


@register_pass("lab-wrong")
@dataclass(frozen=True)
class Wrong(FuncPass):
    """before: %y = t.neg(%x)     after: %y = t.abs(%x)"""

    def run_on(self, func: Func, ctx: PassContext) -> bool:
        return apply_rules(func, [neg_to_abs], self.name, ctx).changed


@register_pass("lab-remark")
@dataclass(frozen=True)
class Remarks(FuncPass):
    """before and after: the same, with a remark about every t.exp."""

    def run_on(self, func: Func, ctx: PassContext) -> bool:
        for op in func.ops:
            if isinstance(op, Exp):
                ctx.remark(op, f"exp of %{op.x.name} is slow")
        return False


@register_pass("lab-blame")
@dataclass(frozen=True)
class Blames(FuncPass):
    """before: anything     after: an error about the first t.exp."""

    def run_on(self, func: Func, ctx: PassContext) -> bool:
        for op in func.ops:
            if isinstance(op, Exp):
                raise blame(op, f"cannot take exp of %{op.x.name}", help="take it elsewhere")
        return False


@register_pass("lab-crash")
@dataclass(frozen=True)
class Crashes(FuncPass):
    """before: anything     after: an exception that is none of ours."""

    def run_on(self, func: Func, ctx: PassContext) -> bool:
        raise ZeroDivisionError("boom")
