"""Passes that are wrong in one way each, loaded by tests with `--load`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from xllm_compiler.ir.core import Builder, Func
from xllm_compiler.ir.ops import Add, Cast, Neg, Silu
from xllm_compiler.ir.rewrite import Rewriter, apply_rules, rule
from xllm_compiler.passes.base import FuncPass, PassContext
from xllm_compiler.passes.registry import register_pass


@register_pass("fault-raises")
@dataclass(frozen=True)
class Raises(FuncPass):
    """Raises at the first t.neg."""

    def run_on(self, func: Func, ctx: PassContext) -> bool:
        for op in func.ops:
            if isinstance(op, Neg):
                raise KeyError("surprise")
        return False


@register_pass("with-options")
@dataclass(frozen=True)
class WithOptions(FuncPass):
    """Has an option without a default, and one that it checks itself."""

    depth: int
    ratio: float = 0.5

    def __post_init__(self) -> None:
        if self.ratio > 1e16:
            raise ValueError("ratio is too large")

    def run_on(self, func: Func, ctx: PassContext) -> bool:
        return False


@register_pass("fault-rule")
@dataclass(frozen=True)
class RuleRaises(FuncPass):
    """Raises in a rule on t.silu."""

    def run_on(self, func: Func, ctx: PassContext) -> bool:
        return apply_rules(func, [raising], self.name, ctx).changed


@rule(Silu)
def raising(op: Silu, rw: Rewriter) -> bool:
    raise ValueError(op.name)


@register_pass("fault-breaks")
@dataclass(frozen=True)
class Breaks(FuncPass):
    """Puts the last op before the first."""

    def run_on(self, func: Func, ctx: PassContext) -> bool:
        first, last = func.ops[0], func.ops[-1]
        if first is last:
            return False
        last.move_before(first)
        return True


@register_pass("fault-lies")
@dataclass(frozen=True)
class Lies(FuncPass):
    """Renames nothing and says that it did."""

    def run_on(self, func: Func, ctx: PassContext) -> bool:
        return True


@register_pass("fault-means")
@dataclass(frozen=True)
class Means(FuncPass):
    """Computes x + x for silu(x)."""

    def run_on(self, func: Func, ctx: PassContext) -> bool:
        return apply_rules(func, [silu_twice], self.name, ctx).changed


@rule(Silu)
def silu_twice(op: Silu, rw: Rewriter) -> bool:
    rw.replace(op, rw.create(Add, op.x, op.x))
    return True


def through_bf16(func: Func) -> bool:
    for op in func.ops:
        if isinstance(op, Neg) and not isinstance(op.x.op, Cast):
            b = Builder.before(op)
            narrow = b.create(Cast, op.x, dtype="bf16").result
            op.set_operand(0, b.create(Cast, narrow, dtype="f32").result)
            return True
    return False


@register_pass("round-off")
@dataclass(frozen=True)
class RoundOff(FuncPass):
    """Takes the operand of a t.neg through bf16, which is within its own bounds."""

    ulps: ClassVar[int] = 1 << 17

    def run_on(self, func: Func, ctx: PassContext) -> bool:
        return through_bf16(func)


@register_pass("fault-rounds")
@dataclass(frozen=True)
class Rounds(FuncPass):
    """Does the same and declares nothing."""

    idempotent: ClassVar[bool] = False

    def run_on(self, func: Func, ctx: PassContext) -> bool:
        return through_bf16(func)
