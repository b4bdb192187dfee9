"""One wrong pass per kind of fault that the laws are there for. Loaded by path, as someone's own passes would be.

Each plants its fault wherever it can, says so to whoever listens, and leaves its name in the lineage of what it
touched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from xllm_compiler.dims import Dim
from xllm_compiler.ir.core import Func, Op, Stage, Value
from xllm_compiler.ir.ops import AllReduceStart, Const, KvWrite, Mul, Sigmoid, Silu
from xllm_compiler.ir.rewrite import Rewriter, apply_rules, rule
from xllm_compiler.ir.types import Tensor
from xllm_compiler.passes.base import FuncPass, PassContext
from xllm_compiler.passes.registry import register_pass


def touch(ctx: PassContext, rule_name: str, op: Op) -> None:
    """Says that a rewrite was made at `op`, as hand-written passes do."""
    op.loc = op.loc.touched_by(rule_name)
    ctx.tried(rule_name, op, True, [op])


# ------------------------------------------------------------------------------------------ wrong algebra


@rule(Mul)
def quick_silu(op: Mul, rw: Rewriter) -> bool:
    """x * sigmoid(c * x) -> silu(x), whatever c is."""
    for x, gate in ((op.a, op.b), (op.b, op.a)):
        scaled = gate.op.x.op if isinstance(gate.op, Sigmoid) else None
        if isinstance(scaled, Mul) and scaled.a is x and isinstance(scaled.b.op, Const):
            rw.replace(op, rw.create(Silu, x))
            return True
    return False


@register_pass("planted-algebra")
@dataclass(frozen=True)
class Algebra(FuncPass):
    """before: x * sigmoid(1.702 * x)     after: silu(x)"""

    def run_on(self, func: Func, ctx: PassContext) -> bool:
        return apply_rules(func, [quick_silu], self.name, ctx).changed


# ------------------------------------------------------------------------------------------ dropped event


@register_pass("planted-event")
@dataclass(frozen=True)
class LostEvent(FuncPass):
    """before: sched.wait(%e, stream=1), comm.all_reduce_start(.., stream=1)     after: the start does not wait"""

    needs: ClassVar[Stage] = "sched"
    leaves: ClassVar[Stage] = "sched"

    def run_on(self, func: Func, ctx: PassContext) -> bool:
        waits = [op for op in func.ops if op.name == "sched.wait" and ctx.allows("planted-event/drop", op)]
        for op in waits:
            following = op.next
            op.erase()
            assert following is not None
            touch(ctx, "planted-event/drop", following)
        return bool(waits)


# ------------------------------------------------------------------------------------------ overlapping buffers


@register_pass("planted-overlap")
@dataclass(frozen=True)
class Overlap(FuncPass):
    """before: %y = t.add(%a, %b, at=[4096])     after: %y = t.add(%a, %b, at=[0]), where %b lives at 0 as well"""

    needs: ClassVar[Stage] = "buf"
    leaves: ClassVar[Stage] = "buf"

    def run_on(self, func: Func, ctx: PassContext) -> bool:
        """A result is put on an operand that another op reads later."""
        home: dict[Value, Dim] = {}
        changed = False
        for op in func.ops:
            at = op.attrs.get("at")
            offsets = [d for d in at if isinstance(d, Dim)] if isinstance(at, tuple) else []
            if len(offsets) != 1 or len(op.results) != 1 or op.SPEC.view:
                continue
            size = op.result.tensor.nbytes
            read_later = [v for v in op.operands if v in home and any(op.is_before(u) for u in v.users if u.attached)]
            wanted = next((home[v] for v in read_later if v.tensor.nbytes is size and home[v] is not offsets[0]), None)
            if wanted is not None and ctx.allows("planted-overlap/at", op):
                op.set_attr("at", (wanted,))
                touch(ctx, "planted-overlap/at", op)
                changed = True
            else:
                home[op.result] = offsets[0]
        return changed


# ------------------------------------------------------------------------------------------ reordered collective


@register_pass("planted-order")
@dataclass(frozen=True)
class Order(FuncPass):
    """before: all_reduce_start(%a), all_reduce_start(%b)     after: all_reduce_start(%b), all_reduce_start(%a)"""

    idempotent: ClassVar[bool] = False

    def run_on(self, func: Func, ctx: PassContext) -> bool:
        changed = False
        flying: list[AllReduceStart] = []
        for op in list(func.ops):
            if op.name == "comm.wait":
                flying = [f for f in flying if f.result is not op.operands[0]]
            if isinstance(op, AllReduceStart):
                other = next((f for f in flying if f.group == op.group and f.x.type == op.x.type), None)
                if other is not None and op.next is not None and ctx.allows("planted-order/swap", other):
                    other.move_before(op.next)
                    touch(ctx, "planted-order/swap", other)
                    op.loc = op.loc.touched_by("planted-order/swap")
                    flying, changed = [], True
                    continue
                flying.append(op)
        return changed


# ------------------------------------------------------------------------------------------ lost KV write


@rule(KvWrite)
def drop_write(op: KvWrite, rw: Rewriter) -> bool:
    """The version before the write is taken for the one after it."""
    rw.replace(op, op.kv)
    return True


@register_pass("planted-write")
@dataclass(frozen=True)
class LostWrite(FuncPass):
    """before: %kv1 = kv.write(%kv0, ..), kv.attend(%kv1, ..)     after: kv.attend(%kv0, ..)"""

    def run_on(self, func: Func, ctx: PassContext) -> bool:
        return apply_rules(func, [drop_write], self.name, ctx).changed


@register_pass("planted-version")
@dataclass(frozen=True)
class OldVersion(FuncPass):
    """before: %kv1 = kv.write(%kv0, ..), return %kv1     after: return %kv0"""

    def run_on(self, func: Func, ctx: PassContext) -> bool:
        returns = list(func.returns)
        writes = [v.op for v in returns if isinstance(v.op, KvWrite) and ctx.allows("planted-version/return", v.op)]
        for op in writes:
            returns[returns.index(op.result)] = op.kv
            touch(ctx, "planted-version/return", op)
        func.set_returns(returns, func.aliases, func.outputs)
        return bool(writes)


# ------------------------------------------------------------------------------------------ stale type


@register_pass("planted-type")
@dataclass(frozen=True)
class StaleType(FuncPass):
    """before: %s = t.silu(%x) : f32[N, 8]     after: %s = t.silu(%x) : bf16[N, 8], without asking the op"""

    def run_on(self, func: Func, ctx: PassContext) -> bool:
        changed = False
        for op in func.ops:
            if isinstance(op, Silu) and op.result.dtype == "f32" and ctx.allows("planted-type/narrow", op):
                op.result.type = Tensor("bf16", op.result.shape)
                touch(ctx, "planted-type/narrow", op)
                changed = True
        return changed
