"""A function's schedule as a Chrome trace, which Perfetto and chrome://tracing open. Owns the trace-event format.

One process per function, one thread per stream, a complete event per op that takes time or waits, a flow from what was
waited for to the wait, and a counter of the arena's bytes in use. Times are estimates of the cost model, in
microseconds. The format is Google's "Trace Event Format": an object with `traceEvents`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xllm_compiler.analysis.machine import Machine
from xllm_compiler.analysis.simulate import Slot, simulate, streams_of
from xllm_compiler.errors import XllmError
from xllm_compiler.ir.core import Func, Module
from xllm_compiler.ir.groups import world_size
from xllm_compiler.ir.printer import func_names
from xllm_compiler.passes.instruments import Instrument
from xllm_compiler.passes.manager import PipelineReport
from xllm_compiler.report.memory import bytes_in_use, placed_buffers
from xllm_compiler.report.sizes import scenarios

Event = dict[str, Any]

_AT_ONE_TIME = "XCsf"  # an arrow needs its slices, and its end its start


class TimelineFile(Instrument):
    """Writes the timeline of what a pipeline leaves to `path`; see `write_timeline`."""

    def __init__(self, path: Path, machine: Machine, dims: Mapping[str, int] | None = None) -> None:
        self.path, self.machine, self.dims = path, machine, dims

    def finished(self, report: PipelineReport, module: Module) -> None:
        write_timeline(self.path, module, self.machine, self.dims)


def write_timeline(path: Path, module: Module, machine: Machine, dims: Mapping[str, int] | None = None) -> None:
    """Writes the schedule of every function at sizes `dims` (what is not given gets a usual size: a decode step)."""
    write_text(path, json.dumps(trace(module, machine, dims), indent=None, separators=(",", ":")) + "\n")


def trace(module: Module, machine: Machine, dims: Mapping[str, int] | None = None) -> dict[str, Any]:
    """The whole file as JSON data."""
    step = scenarios(module, dims)[0]
    events: list[Event] = []
    for i, func in enumerate(module.funcs.values()):
        events += _process(func, i + 1, step.dims, machine)
    metadata = [e for e in events if e["ph"] == "M"]
    timed = sorted((e for e in events if e["ph"] != "M"), key=lambda e: (e["ts"], _AT_ONE_TIME.index(e["ph"])))
    return {
        "traceEvents": metadata + timed,
        "displayTimeUnit": "ns",
        "otherData": {
            "machine": machine.name,
            "sizes": ", ".join(f"{k}={v}" for k, v in step.dims.items()),
            "times": "estimates of the cost model",
        },
    }


def _process(func: Func, pid: int, dims: Mapping[str, int], machine: Machine) -> list[Event]:
    slots = simulate(func, dims, machine)
    threads = {stream: i + 1 for i, stream in enumerate(streams_of(slots))}
    ranks = world_size(func.module.groups)
    name = f"@{func.name}" if ranks == 1 else f"@{func.name}, one of {ranks} equal ranks"
    events = [_name("process_name", pid, 0, name), _sort("process_sort_index", pid, 0, pid)]
    for stream, tid in threads.items():
        events += [_name("thread_name", pid, tid, stream), _sort("thread_sort_index", pid, tid, tid)]
    names = func_names(func)
    starts = {slot.op: slot for slot in slots}
    for number, slot in enumerate(slots):
        op, tid = slot.op, threads[slot.stream]
        results = ", ".join(names.of(r) for r in op.results)
        begin, end = micros(slot.start), micros(slot.end)
        events.append(
            {
                "ph": "X",
                "name": f"{op.name} {results}".rstrip(),
                "cat": op.name.partition(".")[0],
                "pid": pid,
                "tid": tid,
                "ts": begin,
                "dur": round(end - begin, 3),
                "args": _args(slot, results),
            }
        )
        source = starts.get(slot.waited_for) if slot.waited_for is not None else None
        if source is not None and end > begin:
            # An arrow binds to the slices that run at its two times: well inside them, where no neighbour can.
            flow: Event = {"name": "waits for", "cat": "wait", "pid": pid, "id": pid * 1_000_000 + number}
            since = micros((source.start + source.end) / 2)
            until = max(since, micros((slot.start + slot.end) / 2))
            events.append({"ph": "s", "tid": threads[source.stream], "ts": since, **flow})
            events.append({"ph": "f", "bp": "e", "tid": tid, "ts": until, **flow})
    for at, size in bytes_in_use(placed_buffers(func), slots, dims):
        counter: Event = {"ph": "C", "name": "arena bytes in use", "cat": "memory", "pid": pid, "tid": 0}
        events.append({**counter, "ts": micros(at), "args": {"bytes": size}})
    return events


def _args(slot: Slot, results: str) -> Event:
    op, amounts = slot.op, slot.amounts
    return {
        "op": op.name,
        "results": results,
        "types": ", ".join(str(r.type) for r in op.results),
        "source": op.loc.describe(),
        "lineage": ", ".join(op.loc.lineage),
        "bytes": amounts.bytes,
        "flops": amounts.flops,
        "comm bytes": amounts.comm,
        "limit": slot.estimate.limit,
        "share of compute peak": round(slot.estimate.of_compute, 4),
        "share of memory bandwidth": round(slot.estimate.of_memory, 4),
    }


def _name(kind: str, pid: int, tid: int, name: str) -> Event:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}}


def _sort(kind: str, pid: int, tid: int, index: int) -> Event:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"sort_index": index}}


def micros(seconds: float) -> float:
    """Microseconds to the nanosecond."""
    return round(seconds * 1e6, 3)


def write_text(path: Path, text: str) -> None:
    """Writes a file; XllmError of kind "io" when that fails."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise XllmError("io", f"cannot write: {error.strerror}", where=str(path)) from error
