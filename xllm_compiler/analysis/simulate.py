"""When every op would run: in-order streams, events, collectives in flight. Owns the simulation, in estimated seconds;
must not choose streams or order, and believes what it is given: a missing event shows as ops that overlap.

A stream runs its ops one after the other. `sched.record` marks a point of its stream, and whatever follows the
`sched.wait` for it on another stream starts no earlier. The start of a collective only issues it: it is in flight on
its group's link, one after the other there, while its stream goes on; `comm.wait` blocks until it is done.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from xllm_compiler.analysis.cost import Costs, Estimate, estimate
from xllm_compiler.analysis.machine import Machine
from xllm_compiler.ir.core import Func, Op, Value
from xllm_compiler.ir.cost import Amounts
from xllm_compiler.ir.types import Future

WAITS: Final = frozenset({"sched.wait", "comm.wait"})


@dataclass(frozen=True, slots=True)
class Slot:
    """An op's place in time, on a stream or, for a collective, on a link. `waited_for`: the op whose end a wait is for
    (of an event: the last that its stream ran before it); a wait lasts until then, or no time where that is past."""

    op: Op
    stream: str
    start: float
    end: float
    amounts: Amounts
    estimate: Estimate
    waited_for: Op | None = None

    @property
    def seconds(self) -> float:
        return self.end - self.start


def simulate(func: Func, dims: Mapping[str, int], machine: Machine) -> list[Slot]:
    """A slot for every op that costs time or waits, in list order. `dims`: sizes of all symbols, and "context"."""
    costs = Costs(func)
    clock: dict[str, float] = {}
    last: dict[str, Op] = {}
    done: dict[Value, tuple[float, Op | None]] = {}  # events and futures
    slots: list[Slot] = []
    for op in func.ops:
        stream = f"stream {op.stream}"
        now = clock.get(stream, 0.0)
        amounts = costs.of[op].at(dims)
        took = estimate(amounts, machine)
        if op.name in WAITS:
            ready, source = done.get(op.operands[0], (0.0, None))
            end = max(now, ready)
        elif op.name == "sched.record":
            done[op.result] = (now, last.get(stream))
            continue
        elif amounts.free:
            continue
        elif isinstance(op.results[0].type if op.results else None, Future):
            clock[stream] = now + machine.launch
            stream = f"link @{op.attrs.get('group', '')}"
            now, source = max(now, clock.get(stream, 0.0)), None
            end = now + took.seconds
            done[op.result] = (end, op)
        else:
            end, source = now + took.seconds, None
        slots.append(Slot(op, stream, now, end, amounts, took, source))
        clock[stream], last[stream] = end, op
    return slots


def streams_of(slots: list[Slot]) -> list[str]:
    """The streams in use, in order of their first slot."""
    return list(dict.fromkeys(s.stream for s in slots))


def makespan(slots: list[Slot]) -> float:
    """When the last slot ends."""
    return max((s.end for s in slots), default=0.0)
