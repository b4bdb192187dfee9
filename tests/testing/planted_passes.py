"""Wrong passes for the tests of the reducer and the bisector, loaded by path as someone's own passes would be.

Lines are part of the tests: what bisect prints names them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from xllm_compiler.dims import as_dim
from xllm_compiler.ir.core import Builder, Func, Module, Op, Value
from xllm_compiler.ir.ops import Add, Const, KvAttend, KvWrite, Linear, Mul, Neg, Param, Reduce, Silu, Sub
from xllm_compiler.ir.rewrite import Rewriter, apply_rules, rule
from xllm_compiler.ir.types import Tensor
from xllm_compiler.passes.base import FuncPass, Pass, PassContext
from xllm_compiler.passes.registry import register_pass


def _done(op: Op, what: str) -> bool:
    return f"shuffle/{what}" in op.loc.lineage


def _is_param(v: Value, name: str) -> bool:
    return isinstance(v.op, Param) and v.op.name_ == name


@rule(Add, Mul)
def swap_operands(op: Add | Mul, rw: Rewriter) -> bool:
    """a + b -> b + a; but a * b -> b + a where a is one norm's weight."""
    if _done(op, "swap-operands"):
        return False
    wrong = _is_param(op.a, "model.layers.1.post_attention_layernorm.weight")
    rw.replace(op, rw.create(Add if wrong else type(op), op.b, op.a))
    return True


@rule(Op)
def negate_twice(op: Op, rw: Rewriter) -> bool:
    """y -> -(-y), of every float but factors that are params, by which the rule above tells where to go wrong."""
    if _done(op, "negate-twice") or len(op.results) != 1 or isinstance(op, Const):
        return False
    y = op.result
    if not isinstance(y.type, Tensor) or not y.type.is_float or not y.has_uses:
        return False
    if isinstance(op, Param) and any(isinstance(user, Mul) for user in y.users):
        return False
    users = y.uses
    rw.after(op)
    twice = rw.create(Neg, rw.create(Neg, y).result).result
    for user, i in users:
        user.set_operand(i, twice)
    rw.modified(op)
    return True


@register_pass("shuffle")
@dataclass(frozen=True)
class Shuffle(FuncPass):
    """`t.mul(a, b)` -> `t.mul(b, a)`, `y` -> `t.neg(t.neg(y))`; hundreds of rewrites, of which one is wrong."""

    idempotent: ClassVar[bool] = False

    def run_on(self, func: Func, ctx: PassContext) -> bool:
        return apply_rules(func, [swap_operands, negate_twice], "shuffle", ctx).changed


@rule(KvWrite)
def lose_write(op: KvWrite, rw: Rewriter) -> bool:
    rw.replace(op, op.kv)
    return True


@register_pass("lose-write")
@dataclass(frozen=True)
class LoseWrite(FuncPass):
    """`kv.attend(kv.write(kv, ..))` -> `kv.attend(kv)`."""

    def run_on(self, func: Func, ctx: PassContext) -> bool:
        return apply_rules(func, [lose_write], "lose-write", ctx).changed


@rule(Silu)
def stumble(op: Silu, rw: Rewriter) -> bool:
    """Raises on a silu that feeds a product, in one way if there is attention and in another if there is none."""
    if any(isinstance(u, Mul) for u in op.result.users):
        kinds = {type(o) for o in op.func.ops}
        raise KeyError(op.result.name) if KvAttend in kinds else IndexError("no attention")
    return False


@register_pass("stumble")
@dataclass(frozen=True)
class Stumble(FuncPass):
    """Raises."""

    def run_on(self, func: Func, ctx: PassContext) -> bool:
        return apply_rules(func, [stumble], "stumble", ctx).changed


@register_pass("stale-type")
@dataclass(frozen=True)
class StaleType(FuncPass):
    """Changes the type of every `t.silu` but not what it computes; asks for every one."""

    def run_on(self, func: Func, ctx: PassContext) -> bool:
        changed = False
        for op in func.ops:
            if isinstance(op, Silu) and ctx.allows("stale-type/silu", op):
                op.result.type = op.result.tensor.with_(shape=(3,))
                ctx.tried("stale-type/silu", op, True, [op])
                changed = True
        return changed


@register_pass("liar")
@dataclass(frozen=True)
class Liar(Pass):
    """Says it changed something whenever there is attention."""

    def run(self, module: Module, ctx: PassContext) -> bool:
        return any(isinstance(op, KvAttend) for f in module.funcs.values() for op in f.ops)


@register_pass("silent")
@dataclass(frozen=True)
class Silent(FuncPass):
    """`kind=mean` -> `kind=max`, without asking."""

    def run_on(self, func: Func, ctx: PassContext) -> bool:
        changed = False
        for op in func.ops:
            if isinstance(op, Reduce) and op.kind == "mean":
                op.set_attr("kind", "max")
                changed = True
        return changed


@rule(Linear)
def round_off(op: Linear, rw: Rewriter) -> bool:
    """y -> (y + 4096) - 4096: right in exact arithmetic."""
    if op.loc.lineage:
        return False
    y, c = rw.create(Linear, op.x, op.w).result, rw.create(Const, value=4096.0).result
    rw.replace(op, rw.create(Sub, rw.create(Add, y, c).result, c))
    return True


@register_pass("round-off")
@dataclass(frozen=True)
class RoundOff(FuncPass):
    """`y` -> `(y + 4096) - 4096`."""

    def run_on(self, func: Func, ctx: PassContext) -> bool:
        return apply_rules(func, [round_off], "round-off", ctx).changed


@register_pass("negate")
@dataclass(frozen=True)
class Negate(FuncPass):
    """Every `t.add` gets a sign more at the places in `wrong` (such as "2-5"), and two signs more elsewhere."""

    wrong: str = ""
    one: bool = False

    def run_on(self, func: Func, ctx: PassContext) -> bool:
        wrong = {int(n) for n in self.wrong.split("-") if n}
        count = 0
        for op in func.ops:
            if not isinstance(op, Add) or op.loc.lineage or not ctx.allows("negate/add", op):
                continue
            count += 1
            users = op.result.uses
            b = Builder.after(op, op.loc.touched_by("negate/add"))
            made: list[Op] = []
            v = op.result
            for _ in range(1 if count in wrong else 2):
                made.append(b.create(Neg, v))
                v = made[-1].result
            for user, i in users:
                user.set_operand(i, v)
            op.loc = op.loc.touched_by("negate/add")
            ctx.tried("negate/add", op, True, made)
            if self.one:
                break
        return count > 0


@register_pass("overlap")
@dataclass(frozen=True)
class Overlap(FuncPass):
    """Puts what attention yields at the start of the arena."""

    needs = leaves = "buf"

    def run_on(self, func: Func, ctx: PassContext) -> bool:
        changed = False
        for op in func.ops:
            if (
                isinstance(op, KvAttend)
                and op.attrs.get("at") not in (None, (as_dim(0),))
                and ctx.allows("overlap/at", op)
            ):
                op.set_attr("at", (as_dim(0),))
                ctx.tried("overlap/at", op, True, [op])
                changed = True
        return changed


@register_pass("drop-wait")
@dataclass(frozen=True)
class DropWait(FuncPass):
    """Erases the first `sched.wait`."""

    needs = leaves = "sched"

    def run_on(self, func: Func, ctx: PassContext) -> bool:
        for op in func.ops:
            if op.name == "sched.wait" and ctx.allows("drop-wait/wait", op):
                op.erase()
                ctx.tried("drop-wait/wait", op, True)
                return True
        return False
