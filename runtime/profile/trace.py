"""Recorded steps as a Chrome trace: a thread for the host, one for each member. Owns that picture.

The format is Google's "Trace Event Format", as in the compiler's timelines, which a runtime may not import.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xllm_compiler.artifact.calls import CallTable
from xllm_compiler.errors import XllmError
from xllm_compiler.runtime.profile.clock import Clock
from xllm_compiler.runtime.profile.record import Step

Event = dict[str, Any]


def write_trace(path: Path, steps: Sequence[Step], table: CallTable, clock: Clock, about: dict[str, str]) -> None:
    """Writes the trace of `steps`. Raises XllmError("io")."""
    text = json.dumps(trace(steps, table, clock, about), separators=(",", ":"), allow_nan=False)
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise XllmError("io", f"cannot write the profile's trace: {error.strerror}", where=str(path)) from None


def trace(steps: Sequence[Step], table: CallTable, clock: Clock, about: dict[str, str]) -> Event:
    """The whole file as JSON data; times in microseconds since the first step's beginning."""
    members = max((step.stamps.shape[0] for step in steps), default=0)
    threads = ["host", *(f"member {m}" for m in range(members))]
    metadata = [_meta("process_name", 0, "name", "steps")]
    for tid, name in enumerate(threads):
        metadata += [
            _meta("thread_name", tid + 1, "name", name),
            _meta("thread_sort_index", tid + 1, "sort_index", tid),
        ]
    zero = min((step.begin for step in steps), default=0)
    events: list[Event] = []
    for step in steps:
        calls = table.programs[step.program]
        sizes = {"N": step.n, "B": step.b, "S": step.s, "context": step.context}
        events.append(_slice(f"{step.kind} ({step.program})", "step", 1, step.begin - zero, step.end - zero, sizes))
        if step.until:
            phases = {f"{name} ms": round(seconds * 1e3, 4) for name, seconds in step.host.items()}
            events.append(_slice("between steps", "host", 1, step.end - zero, step.until - zero, phases))
        at = clock.nanoseconds(step.stamps) - zero
        for member in range(len(at)):
            for i, index in enumerate(calls.kernels):
                # before the kernel: a wait too short for the counter begins when the kernel does
                if i and calls.barriers[i]:
                    events.append(_slice("barrier", "wait", member + 2, at[member, i - 1, 1], at[member, i, 0], {}))
                kernel = table.kernels[index]
                args = {"ops": ", ".join(kernel.ops), "source": calls.sources[i], "call": i}
                events.append(_slice(kernel.symbol, "kernel", member + 2, at[member, i, 0], at[member, i, 1], args))
    events.sort(key=lambda e: e["ts"])
    return {"traceEvents": metadata + events, "displayTimeUnit": "ns", "otherData": about}


def _meta(name: str, tid: int, key: str, value: str | int) -> Event:
    return {"ph": "M", "name": name, "pid": 1, "tid": tid, "args": {key: value}}


def _slice(name: str, category: str, tid: int, begin: float, end: float, args: Event) -> Event:
    since, until = round(float(begin) / 1e3, 3), round(float(end) / 1e3, 3)
    since = max(0.0, since)
    duration = round(max(0.0, until - since), 3)
    return {"ph": "X", "name": name, "cat": category, "pid": 1, "tid": tid, "ts": since, "dur": duration, "args": args}
