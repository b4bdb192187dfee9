"""Inserts the events that a given assignment of streams needs."""

from __future__ import annotations

from xllm_compiler.analysis.happens_before import Clock, passed
from xllm_compiler.analysis.weights import weight_exprs
from xllm_compiler.ir.core import Builder, Func, Op
from xllm_compiler.ir.ops import Collective, Record, WaitEvent
from xllm_compiler.ir.state import readers, used_version


def insert_events(func: Func, lineage: str) -> tuple[int, int]:
    """Adds the events without which an op could run before what it depends on, and no others; (records, waits).

    An op depends on the ops that make its operands, on the readers of the state's version that it uses up, and, where
    it starts a collective, on the start before it of the same group. A record stands right after the op that is
    depended on and is shared by all who wait for it; a wait stands right before the op that depends. What streams,
    futures and the events so far already order gets no event.
    """
    weights = weight_exprs(func)
    ops = [op for op in func.ops if not (op.results and all(r in weights for r in op.results))]
    streams = sorted({op.stream for op in ops})
    if len(streams) < 2:
        return 0, 0
    slot = {s: i for i, s in enumerate(streams)}
    now: list[Clock] = [tuple([0] * len(streams)) for _ in streams]
    after: dict[Op, Clock] = {}
    records: dict[Op, Record] = {}
    starts: dict[str, Op] = {}
    waits = 0
    for op in ops:
        at = slot[op.stream]
        clock = now[at]
        if op.name in ("sched.wait", "comm.wait") and op.operands[0].op is not None:
            clock = _join(clock, after[op.operands[0].op])
        wanted = [d for d in _depends_on(op, starts) if d in after]
        missing = [d for d in wanted if clock[slot[d.stream]] < after[d][slot[d.stream]]]
        for needed in _latest(missing, after):
            if needed not in records:
                records[needed] = Builder.after(needed).create(
                    Record, stream=needed.stream, loc=needed.loc.touched_by(lineage)
                )
            Builder.before(op).create(
                WaitEvent, records[needed].result, stream=op.stream, loc=op.loc.touched_by(lineage)
            )
            waits += 1
            clock = _join(clock, after[needed])
        after[op] = now[at] = (*clock[:at], clock[at] + 1, *clock[at + 1 :])
    return len(records), waits


def _depends_on(op: Op, starts: dict[str, Op]) -> list[Op]:
    """What must be done before `op` begins, in any order. `starts`: the newest of each group; kept up to date."""
    out = [v.op for v in op.operands if v.op is not None]
    version = used_version(op)
    if version is not None:
        out += readers(version)
    if isinstance(op, Collective):
        if op.group in starts:
            out.append(starts[op.group])
        starts[op.group] = op
    return out


def _latest(ops: list[Op], after: dict[Op, Clock]) -> list[Op]:
    """Those of `ops` that no other one comes after, in list order."""
    distinct = list(dict.fromkeys(ops))
    kept = [a for a in distinct if not any(b is not a and passed(after[b], after[a]) for b in distinct)]
    return sorted(kept, key=lambda op: op.func.ops.order(op))


def _join(a: Clock, b: Clock) -> Clock:
    return tuple(map(max, a, b))
