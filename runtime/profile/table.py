"""Recorded steps as a table per kernel. Owns the attribution of time, which adds up to the steps' wall time exactly.

Times are means over the members of the team. A call's time is the kernel's own and the waiting after it, which ends
when the next call begins: at a barrier, or, after the last one, when the slowest member is done. To these come the
beginning (until a member's first call), the call (Python to native code and back) and the host's phases until the next
step.

Of the recorded steps the quicker half is taken, so that a core which something else had for a while does not blur the
picture; the table says how long all of them took.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from xllm_compiler.artifact.calls import CONTEXT, COSTS, CallTable, KernelCost, cost_dim
from xllm_compiler.runtime.profile.clock import Clock
from xllm_compiler.runtime.profile.record import Step


@dataclass(frozen=True, slots=True)
class Peaks:
    """What the machine can do at most in a second: bytes read, and operations in each arithmetic."""

    read_bytes: float
    bf16: float
    i8: float
    f32: float

    def operations(self, arithmetic: str) -> float:
        """The peak of one arithmetic; that of f32 where the machine has no instruction for it."""
        return float(getattr(self, arithmetic)) or self.f32


@dataclass(frozen=True, slots=True)
class Row:
    """All calls of one kernel in a step; `source` is the first one's. `seconds`: kernels and waiting; `waiting`: of it;
    `bytes`, `operations`: per step. `memory_share`, `compute_share`: of the peaks, None where those are not known."""

    kernel: str
    ops: tuple[str, ...]
    source: str
    calls: int
    seconds: float
    waiting: float
    bytes: float
    operations: float
    arithmetic: str
    memory_share: float | None
    compute_share: float | None


@dataclass(frozen=True, slots=True)
class Profile:
    """Steps of one kind and program, in seconds per step. `native`: from the first member's beginning to the last one's
    end; it is the sum of the rows and `start`. `call`: the rest of the call. `host`: phases until the next step;
    `barrier_least`: what the last to arrive waited, summed over the barriers, the part of waiting that is no imbalance.
    `disorder`: how far the members' counters contradict the barriers; 0 where they agree."""

    kind: str
    program: str
    threads: int
    recorded: int
    used: int
    steps: tuple[float, ...]
    sizes: dict[str, float]
    native: float
    start: float
    call: float
    host: dict[str, float]
    idle: float
    barriers: int
    barrier_least: float
    disorder: float
    rows: tuple[Row, ...]

    def to_json(self) -> dict[str, Any]:
        """JSON data of the fields."""
        return asdict(self)


def profiles(steps: Sequence[Step], table: CallTable, clock: Clock, pages: int, peaks: Peaks | None) -> list[Profile]:
    """One profile for each kind and program among `steps`, in the order of their first steps."""
    groups: dict[tuple[str, str], list[Step]] = {}
    for step in steps:
        groups.setdefault((step.kind, step.program), []).append(step)
    return [_profile(group, table, clock, pages, peaks) for group in groups.values()]


def _profile(steps: Sequence[Step], table: CallTable, clock: Clock, pages: int, peaks: Peaks | None) -> Profile:
    calls = table.programs[steps[0].program]
    quick = sorted(steps, key=lambda s: s.end - s.begin)[: (len(steps) + 1) // 2]
    at = clock.nanoseconds(np.stack([s.stamps for s in quick])) / 1e9  # [steps, members, calls, 2]
    begin, end = at[..., 0], at[..., 1]
    first, last = begin[:, :, 0].min(1), end[:, :, -1].max(1)
    following = np.concatenate([begin[:, :, 1:], np.broadcast_to(last[:, None, None], (*begin.shape[:2], 1))], 2)
    gaps = following - end
    busy, waiting = (end - begin).mean((0, 1)), gaps.mean((0, 1))
    native = float((last - first).mean())
    call = statistics.fmean(s.end - s.begin for s in quick) / 1e9 - native
    meets = np.array([*calls.barriers[1:], 0], bool)
    # Nobody leaves a barrier before everybody has come, so the last to come says what the barrier itself takes.
    least = gaps.min(1).mean(0)[meets]
    order = (end.max(1) - following.min(1))[:, meets]
    rows = []
    for index, kernel in enumerate(table.kernels):
        mine = [i for i, k in enumerate(calls.kernels) if k == index]
        if mine:
            seconds = float((busy + waiting)[mine].sum())
            rows.append(
                _row(kernel, calls.sources[mine[0]], len(mine), seconds, waiting[mine].sum(), quick, pages, peaks)
            )
    after = [s for s in quick if s.until]
    host = {k: statistics.fmean(s.host[k] for s in after) for k in (after[0].host if after else ())}
    between = statistics.fmean(s.until - s.end for s in after) / 1e9 if after else 0.0
    return Profile(
        kind=steps[0].kind,
        program=steps[0].program,
        threads=begin.shape[1],
        recorded=len(steps),
        used=len(quick),
        steps=tuple((s.end - s.begin) / 1e9 for s in steps),
        sizes={name: statistics.fmean(getattr(s, name) for s in quick) for name in ("n", "b", "s", "context")},
        native=native,
        start=float((begin[:, :, 0] - first[:, None]).mean()),
        call=call,
        host=host,
        idle=max(0.0, between - sum(host.values())),
        barriers=int(meets.sum()),
        barrier_least=float(least.sum()),
        disorder=max(0.0, float(order.max())) if order.size else 0.0,
        rows=tuple(sorted(rows, key=lambda row: -row.seconds)),
    )


def _row(
    kernel: KernelCost,
    source: str,
    calls: int,
    seconds: float,
    waiting: float,
    steps: Sequence[Step],
    pages: int,
    peaks: Peaks | None,
) -> Row:
    dims = {name: cost_dim(getattr(kernel, name), kernel.symbol) for name in COSTS}
    sums = dict.fromkeys(COSTS, 0)
    for step in steps:
        sizes = {"N": step.n, "B": step.b, "S": step.s, "P": pages, CONTEXT: step.context}
        for name, dim in dims.items():
            sums[name] += dim.evaluate(sizes)
    operations = sums.pop("operations") * calls / len(steps)
    moved = sum(sums.values()) * calls / len(steps)
    memory = compute = None
    if peaks is not None and seconds > 0:
        memory = moved / seconds / peaks.read_bytes
        compute = operations / seconds / peaks.operations(kernel.arithmetic)
    return Row(
        kernel.symbol,
        kernel.ops,
        source,
        calls,
        seconds,
        float(waiting),
        moved,
        operations,
        kernel.arithmetic,
        memory,
        compute,
    )


def show(profile: Profile) -> str:
    """A table for people; of a kernel's calls the first one's layer is named."""
    p = profile
    sizes = ", ".join(f"{name}={value:.0f}" for name, value in p.sizes.items())
    times = sorted(p.steps)
    lines = [
        f"{p.kind}: program {p.program}, {sizes} (on average), {p.threads} threads; the quicker {p.used} of "
        f"{p.recorded} steps of {_ms(times[0])} to {_ms(times[-1])} ms, median {_ms(statistics.median(times))}"
    ]
    known = any(row.memory_share is not None for row in p.rows)
    whole = p.native + p.call
    head = f"{'calls':>5} {'ms':>8} {'%':>5} {'wait ms':>8} {'GB/s':>6} {'GOP/s':>7} {'in':>4}"
    lines.append(head + (f" {'limit':>10}" if known else "") + "  kernel")
    for row in p.rows:
        rate = (row.bytes / row.seconds / 1e9, row.operations / row.seconds / 1e9) if row.seconds > 0 else (0.0, 0.0)
        text = f"{row.calls:>5} {_ms(row.seconds):>8} {100 * row.seconds / whole:>5.1f} {_ms(row.waiting):>8}"
        text += f" {rate[0]:>6.1f} {rate[1]:>7.1f} {row.arithmetic:>4}"
        if row.memory_share is not None and row.compute_share is not None:
            share, what = max((row.memory_share, "mem"), (row.compute_share, "ops"))
            text += f" {100 * share:>4.0f} % {what}"
        place = row.source.partition(" (")[0]
        lines.append(f"{text}  {row.kernel}" + (f", {place}" if place else ""))
    waited = sum(row.waiting for row in p.rows)
    rest = [
        ("the team's start", p.start, ""),
        ("call from Python", p.call, ""),
        (
            "step",
            whole,
            f"waiting {_ms(waited)} ms of it: {p.barriers} barriers take {_ms(p.barrier_least)} ms at least",
        ),
    ]
    rest += [(f"host: {name}", seconds, "") for name, seconds in p.host.items()]
    if p.host:
        rest.append(("host: other and idle", p.idle, ""))
    lines += [
        f"{'':5} {_ms(s):>8} {100 * s / whole:>5.1f}  {name}{': ' if note else ''}{note}" for name, s, note in rest
    ]
    if p.disorder > 1e-6:
        lines.append(
            f"the cores' counters disagree by {p.disorder * 1e6:.1f} us or more: times of calls are that uncertain"
        )
    if not known:
        lines.append("shares of this machine's limits: bench/step_profile.py measures them")
    return "\n".join(lines)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}"
