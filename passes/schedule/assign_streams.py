"""assign-streams: lets collectives run beside computing. Owns which stream starts them; the events are events.py's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from xllm_compiler.errors import XllmError
from xllm_compiler.ir.core import Func, Module, Op, Stage
from xllm_compiler.ir.ops import Collective, Wait
from xllm_compiler.passes.base import Pass, PassContext
from xllm_compiler.passes.registry import register_pass
from xllm_compiler.passes.schedule.events import insert_events


@register_pass("assign-streams")
@dataclass(frozen=True)
class AssignStreams(Pass):
    """Starts collectives on stream `comm`, ordered by the events that this needs; everything else stays on stream 0.

    before:  %a = t.exp(%x) : f32[N]
             %f = comm.all_reduce_start(%a, group=@tp) : !future<f32[N]>
             %y = comm.wait(%f) : f32[N]
    after:   %a = t.exp(%x) : f32[N]
             %e = sched.record() : !event
             sched.wait(%e, stream=1)
             %f = comm.all_reduce_start(%a, group=@tp, stream=1) : !future<f32[N]>
             %y = comm.wait(%f) : f32[N]

    `move`: a start stands as early as its operand allows and a comm.wait as late as its first user allows, so that more
    fits in between; no start passes another. Without collectives only the stage changes, to sched. `comm=0`: no events.
    """

    comm: int = 1
    move: bool = False

    leaves: ClassVar[Stage] = "sched"
    samples: ClassVar[tuple[str, ...]] = ("{move=true}", "{comm=0,move=true}")

    def __post_init__(self) -> None:
        if self.comm < 0:
            raise XllmError("option", f"option comm of pass assign-streams is a stream number, not {self.comm}")

    def run(self, module: Module, ctx: PassContext) -> bool:
        for func in module.funcs.values():
            if self.move:
                _spread(func, ctx)
            for op in func.ops:
                if self.comm and isinstance(op, Collective) and ctx.allows("assign-streams/stream", op):
                    op.set_attr("stream", self.comm)
                    op.loc = op.loc.touched_by("assign-streams/stream")
                    ctx.tried("assign-streams/stream", op, True, [op])
                    ctx.stat("collectives", 1)
            records, waits = insert_events(func, "assign-streams/event")
            if waits:
                ctx.stat("events", records)
                ctx.stat("waits", waits)
        module.stage = "sched"
        return True


def _spread(func: Func, ctx: PassContext) -> None:
    """Starts up, waits down; a use and the order of the starts are kept."""
    previous: Op | None = None
    for op in [op for op in func.ops if isinstance(op, Collective)]:
        after = [v.op for v in op.operands if v.op is not None] + ([previous] if previous is not None else [])
        last = max(after, key=func.ops.order, default=None)
        anchor = func.ops.first if last is None else last.next
        if anchor is not None and anchor is not op:
            _move(op, anchor, "assign-streams/start-early", ctx)
        previous = op
    for wait in [op for op in func.ops if isinstance(op, Wait)]:
        users = [user for user in wait.result.users if user is not func.ret]
        until = min(users, key=func.ops.order, default=None)
        following = wait.next
        while following is not None and following is not until and isinstance(following, Wait):
            following = following.next
        if following is not until:
            _move(wait, until, "assign-streams/wait-late", ctx)


def _move(op: Op, before: Op | None, rule: str, ctx: PassContext) -> None:
    """Puts `op` before another, or last."""
    if not ctx.allows(rule, op):
        return
    if before is None:
        op.func.ops.unlink(op)
        op.func.ops.append(op)
    else:
        op.move_before(before)
    op.loc = op.loc.touched_by(rule)
    ctx.tried(rule, op, True, [op])
    ctx.stat("moved", 1)
