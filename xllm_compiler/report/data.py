"""Everything that a report shows, as one JSON value. Owns its form, which the scripts in assets read; must not write
HTML, and leaves out what a second run would not repeat, such as times of passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from xllm_compiler.analysis.cost import Costs, estimate
from xllm_compiler.analysis.machine import Machine
from xllm_compiler.analysis.simulate import WAITS, Slot, makespan, simulate, streams_of
from xllm_compiler.ir.core import Func, Module
from xllm_compiler.ir.cost import Amounts
from xllm_compiler.ir.ops import Param
from xllm_compiler.ir.printer import func_names
from xllm_compiler.ir.types import DTYPE_BYTES, Kv
from xllm_compiler.passes.instruments import History
from xllm_compiler.passes.manager import PipelineReport
from xllm_compiler.report.changes import changes
from xllm_compiler.report.graph import graph_data
from xllm_compiler.report.memory import Placed, placed_buffers
from xllm_compiler.report.sizes import Scenario, scenarios
from xllm_compiler.report.timeline import micros
from xllm_compiler.report.tries import Tries


def report_data(
    module: Module,
    history: History,
    report: PipelineReport,
    title: str,
    machine: Machine,
    dims: Mapping[str, int] | None = None,
    tries: Tries | None = None,
) -> dict[str, Any]:
    """The report of a pipeline that has left `module`."""
    steps = scenarios(module, dims)
    funcs = []
    for func in module.funcs.values():
        costs = Costs(func)
        slots = [simulate(func, step.dims, machine) for step in steps]
        funcs.append(
            {
                **graph_data(func, costs, steps, machine),
                "totals": [_totals(costs, step, s, machine) for step, s in zip(steps, slots, strict=True)],
                "memory": memory_data(func, steps),
                "timeline": [timeline_data(func, s) for s in slots],
            }
        )
    return {
        "title": title,
        "stage": module.stage,
        "facts": _facts(module, report),
        "machine": {
            "name": machine.name,
            "flops": machine.flops,
            "bandwidth": machine.bandwidth,
            "launch": machine.launch,
            "link": machine.link,
        },
        "scenarios": [{"name": step.name, "dims": dict(step.dims)} for step in steps],
        "funcs": funcs,
        "passes": _passes(history, report),
        "rules": [] if tries is None else tries.data(),
        "remarks": [
            {"pass": r.pass_name, "text": r.text, "where": r.where, "source": r.loc.describe()}
            for r in report.ctx.remarks
        ],
    }


def _facts(module: Module, report: PipelineReport) -> list[list[str]]:
    """What is known of the model, as rows of a table."""
    params = [op for f in module.funcs.values() for op in f.ops if isinstance(op, Param)]
    unique = {op.name_: op.result.tensor for op in params}
    caches = [a.type for f in module.funcs.values() for a in f.args if isinstance(a.type, Kv)]
    token = sum(kv.heads * (kv.k_dim + kv.v_dim) * DTYPE_BYTES[kv.dtype] for kv in caches)
    rows = [
        ["functions", ", ".join(f"@{name}" for name in module.funcs)],
        ["stage", module.stage],
        ["parameters", f"{len(unique)} tensors, {_sum_bytes(unique.values()):,} bytes"],
    ]
    if caches:
        rows.append(["KV cache", f"{len(caches)} layers, {token:,} bytes per token"])
    for name, group in module.groups.items():
        apart = f", {group.stride} apart" if group.stride != 1 else ""
        place = f"; {group.rank} is a rank's place" if group.rank else ""
        rows.append([f"group @{name}", f"{group.size} ranks{apart}{place}"])
    for symbol in module.scope.symbols.values():
        bounds = f"{'*' if symbol.lo is None else symbol.lo} to {'*' if symbol.hi is None else format(symbol.hi, ',')}"
        rows.append([f"dim {symbol.name}", f"{bounds}{f' ({symbol.why})' if symbol.why else ''}"])
    for func in module.funcs.values():
        if func.arena is not None:
            rows.append([f"arena of @{func.name}", str(func.arena)])
    if report.runs:
        rows.append(["ops", f"{report.runs[0].ops_before} before the passes, {report.runs[-1].ops_after} after"])
        changed = sum(run.changed for run in report.runs)
        rows.append(["passes", f"{len(report.runs)} runs, {changed} of them changed something"])
    return rows


def _sum_bytes(types: Any) -> int:
    return sum(t.nbytes.value if t.nbytes.is_const else 0 for t in types)


def _totals(costs: Costs, step: Scenario, slots: Sequence[Slot], machine: Machine) -> dict[str, Any]:
    total = costs.total(step.dims)
    spent: dict[str, float] = {}
    for cost in costs.of.values():
        took = estimate(cost.at(step.dims), machine)
        if took.limit:
            spent[took.limit] = spent.get(took.limit, 0.0) + took.seconds
    arena = costs.func.arena
    return {
        "us": micros(makespan(list(slots))),
        "arena": None if arena is None else arena.evaluate(dict(step.dims)),
        "spent": {limit: micros(seconds) for limit, seconds in sorted(spent.items(), key=lambda x: (-x[1], x[0]))},
        **_amounts(total),
    }


def _amounts(total: Amounts) -> dict[str, int]:
    return {
        "bytes": total.bytes,
        "activations": total.read + total.written,
        "weights": total.weights,
        "kv": total.kv_read + total.kv_written,
        "flops": total.flops,
        "comm": total.comm,
    }


def memory_data(func: Func, steps: Sequence[Scenario]) -> dict[str, Any] | None:
    """The buffers, where they lie at every step's sizes, and each step's peak; None where nothing is planned."""
    buffers = placed_buffers(func)
    if not buffers:
        return None
    names, position = func_names(func), {op: i for i, op in enumerate(func.ops)}
    return {
        "buffers": [
            {
                "name": names.of(b.value),
                "type": str(b.value.type),
                "offset": str(b.offset),
                "size": str(b.bytes),
                "start": b.range.start,
                "end": min(b.range.end, len(position) - 1),
                "users": sorted(position[op] for op in b.users if op in position),
            }
            for b in buffers
        ],
        "at": [_places(buffers, step) for step in steps],
    }


def _places(buffers: Sequence[Placed], step: Scenario) -> dict[str, Any]:
    dims = dict(step.dims)
    sizes = [b.bytes.evaluate(dims) for b in buffers]
    change: dict[int, int] = {}
    for b, size in zip(buffers, sizes, strict=True):
        change[b.range.start] = change.get(b.range.start, 0) + size
        change[b.range.end + 1] = change.get(b.range.end + 1, 0) - size
    total = peak = at = 0
    for position in sorted(change):
        total += change[position]
        if total > peak:
            peak, at = total, position
    return {"offset": [b.offset.evaluate(dims) for b in buffers], "size": sizes, "peak": peak, "peak_at": at}


def timeline_data(func: Func, slots: Sequence[Slot]) -> dict[str, Any]:
    """Streams and the slots on them: [op index, stream, start, end, index of the slot waited for or -1], in us."""
    streams = streams_of(list(slots))
    lane = {name: i for i, name in enumerate(streams)}
    position = {op: i for i, op in enumerate(func.ops)}
    index = {slot.op: i for i, slot in enumerate(slots)}
    return {
        "streams": streams,
        "slots": [
            [
                position[s.op],
                lane[s.stream],
                micros(s.start),
                micros(s.end),
                index.get(s.waited_for, -1) if s.waited_for else -1,
            ]
            for s in slots
        ],
        "waits": [i for i, s in enumerate(slots) if s.op.name in WAITS],
    }


def _passes(history: History, report: PipelineReport) -> list[dict[str, Any]]:
    """Every run, with the changes of those that changed something."""
    texts: dict[int, tuple[str, str]] = {}
    for (_, before), (run, after) in zip(history.texts, history.texts[1:], strict=False):
        assert run is not None
        texts[run.index] = (before, after)
    out = []
    for run in report.runs:
        entry: dict[str, Any] = {
            "index": run.index,
            "text": run.text,
            "name": run.name,
            "changed": run.changed,
            "before": run.ops_before,
            "after": run.ops_after,
            "stats": dict(sorted(run.stats.items())),
            "sections": [],
            "gone": 0,
            "come": 0,
        }
        if run.index in texts:
            sections, entry["gone"], entry["come"] = changes(*texts[run.index])
            entry["sections"] = [
                {"layer": s.layer or "module", "lines": [list(x) for x in s.lines], "same": s.same} for s in sections
            ]
        out.append(entry)
    return out
