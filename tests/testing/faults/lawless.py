"""Passes that each break one law, and one that keeps all of them; loaded by path as someone's own passes would be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from xllm_compiler.errors import XllmError
from xllm_compiler.ir.core import Builder, Func, Module, Op
from xllm_compiler.ir.ops import AllReduceStart, Cast, Const, Exp, Max, Mul, Neg, Relu, Softmax, Wait
from xllm_compiler.ir.rewrite import Rewriter, apply_rules, rule
from xllm_compiler.passes.base import FuncPass, Pass, PassContext
from xllm_compiler.passes.registry import register_pass


@rule(Relu)
def spell_out(op: Relu, rw: Rewriter) -> bool:
    """relu(x) -> max(x, 0)."""
    rw.replace(op, rw.create(Max, op.x, rw.create(Const, value=0.0).result))
    return True


@dataclass(frozen=True)
class _Sound(FuncPass):
    """relu(x) -> max(x, 0): what the passes below do besides their fault, so that they are exercised."""

    def run_on(self, func: Func, ctx: PassContext) -> bool:
        return apply_rules(func, [spell_out], self.name, ctx).changed


@register_pass("keeps")
@dataclass(frozen=True)
class Keeps(_Sound):
    """Keeps every law; refuses what it does not know."""

    refuse: bool = True
    samples: ClassVar[tuple[str, ...]] = ("{refuse=false}",)

    def run(self, module: Module, ctx: PassContext) -> bool:
        if self.refuse and any(isinstance(op, Softmax) for f in module.funcs.values() for op in f.ops):
            raise XllmError("unsupported", "softmax is not for this pass")
        return super().run(module, ctx)


@rule(Relu)
def spell_out_half(op: Relu, rw: Rewriter) -> bool:
    """relu(x) -> max(x, 0) * 0.5, as if a scale had been forgotten."""
    whole = rw.create(Max, op.x, rw.create(Const, value=0.0).result)
    rw.replace(op, rw.create(Mul, whole.result, rw.create(Const, value=0.5).result))
    return True


@register_pass("loses-half")
@dataclass(frozen=True)
class LosesHalf(FuncPass):
    """May lose a little, and loses half."""

    @property
    def loss(self) -> float:
        return 0.05

    def run_on(self, func: Func, ctx: PassContext) -> bool:
        return apply_rules(func, [spell_out_half], self.name, ctx).changed


@register_pass("loses-little")
@dataclass(frozen=True)
class LosesLittle(LosesHalf):
    """Loses no more than it may: far more than rounding."""

    def run_on(self, func: Func, ctx: PassContext) -> bool:
        return apply_rules(func, [spell_out_nearly], self.name, ctx).changed


@rule(Relu)
def spell_out_nearly(op: Relu, rw: Rewriter) -> bool:
    """relu(x) -> max(x, 0) * 0.998."""
    whole = rw.create(Max, op.x, rw.create(Const, value=0.0).result)
    rw.replace(op, rw.create(Mul, whole.result, rw.create(Const, value=0.998).result))
    return True


@register_pass("crashes")
@dataclass(frozen=True)
class Crashes(_Sound):
    """Divides by zero where there is a softmax."""

    def run_on(self, func: Func, ctx: PassContext) -> bool:
        for op in func.ops:
            if isinstance(op, Softmax):
                raise ZeroDivisionError("of nothing")
        return super().run_on(func, ctx)


@register_pass("claims-too-much")
@dataclass(frozen=True)
class ClaimsTooMuch(_Sound):
    """Says that it changed what it left alone."""

    def run_on(self, func: Func, ctx: PassContext) -> bool:
        super().run_on(func, ctx)
        return True


@register_pass("denies")
@dataclass(frozen=True)
class Denies(_Sound):
    """Says that it left alone what it changed."""

    def run_on(self, func: Func, ctx: PassContext) -> bool:
        super().run_on(func, ctx)
        return False


@register_pass("hashes")
@dataclass(frozen=True)
class Hashes(_Sound):
    """Remarks on values in the order of a set, which is another one in every process."""

    def run_on(self, func: Func, ctx: PassContext) -> bool:
        ctx.remark(None, " ".join({r.name for op in func.ops for r in op.results}))
        return super().run_on(func, ctx)


@register_pass("restless")
@dataclass(frozen=True)
class Restless(_Sound):
    """exp(x) -> exp(-(-x)), once more on every run."""

    def run_on(self, func: Func, ctx: PassContext) -> bool:
        changed = super().run_on(func, ctx)
        for op in list(func.ops):
            if isinstance(op, Exp):
                b = Builder.before(op, op.loc.touched_by("restless/twice"))
                op.set_operand(0, b.create(Neg, b.create(Neg, op.x).result).result)
                changed = True
        return changed


@register_pass("narrows")
@dataclass(frozen=True)
class Narrows(Pass):
    """Takes a new assumption for granted, so that steps of one token are no longer its business."""

    def run(self, module: Module, ctx: PassContext) -> bool:
        from xllm_compiler.dims import sym

        known = len(module.scope.assumptions)
        module.scope.assume(sym("N") - 2, why="it is easier")
        return len(module.scope.assumptions) > known


@register_pass("renames")
@dataclass(frozen=True)
class Renames(Pass):
    """Calls an argument otherwise."""

    def run(self, module: Module, ctx: PassContext) -> bool:
        changed = False
        for func in module.funcs.values():
            if func.args[0].name == "x":
                func.args[0].name = "input"
                changed = True
        return changed


@register_pass("misspells")
@dataclass(frozen=True)
class Misspells(Pass):
    """Adds a function whose name no text can hold."""

    def run(self, module: Module, ctx: PassContext) -> bool:
        if "two words" in module.funcs:
            return False
        module.add_func("two words")
        return True


@register_pass("rounds")
@dataclass(frozen=True)
class Rounds(_Sound):
    """exp(x) -> exp(x in bf16): the same algebra, with bits missing."""

    def run_on(self, func: Func, ctx: PassContext) -> bool:
        changed = super().run_on(func, ctx)
        for op in list(func.ops):
            if isinstance(op, Exp) and op.x.dtype == "f32" and not isinstance(op.x.op, Cast):
                b = Builder.before(op, op.loc.touched_by("rounds/to-bf16"))
                narrow = b.create(Cast, op.x, dtype="bf16").result
                op.set_operand(0, b.create(Cast, narrow, dtype="f32", hint="narrow").result)
                changed = True
        return changed


@register_pass("lonely")
@dataclass(frozen=True)
class Lonely(_Sound):
    """Takes the maximum over all ranks for this rank's own, which is right where there is one. The number of
    collectives is said to be its business."""

    reorders_collectives: ClassVar[bool] = True

    def run_on(self, func: Func, ctx: PassContext) -> bool:
        changed = super().run_on(func, ctx)
        for op in list(func.ops):
            start: Op | None = op.f.op if isinstance(op, Wait) else None
            if isinstance(start, AllReduceStart) and start.kind == "max":
                op.result.replace_all_uses_with(start.x)
                op.erase()
                start.erase()
                changed = True
        return changed


@register_pass("drops-collective")
@dataclass(frozen=True)
class DropsCollective(Lonely):
    """The same without having said so."""

    reorders_collectives: ClassVar[bool] = False


@register_pass("mistaken")
@dataclass(frozen=True)
class Mistaken(_Sound):
    """Names options that it does not have."""

    samples: ClassVar[tuple[str, ...]] = ("{depth=2}",)


@register_pass("idle")
@dataclass(frozen=True)
class Idle(Pass):
    """Never finds anything to do."""

    def run(self, module: Module, ctx: PassContext) -> bool:
        return False
