"""Records the first steps that an engine runs. Owns what is recorded and when it stops; must not know how it is shown.

A `Recorder` stands between engine and executor. It records `steps` steps of each of two kinds: "decode", where every
request has one token, and "prefill", where some request has more. The first of each kind warms up and is not recorded.
Afterwards it only passes calls on. It changes no input and no output of a step.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from xllm_compiler.artifact.calls import CallTable
from xllm_compiler.runtime.executor import Executor, Outputs
from xllm_compiler.runtime.profile.clock import Clock
from xllm_compiler.step.inputs import StepBatch
from xllm_compiler.step.interface import STEP

KINDS: Final = ("prefill", "decode")
MAX_STEPS: Final = 1000
"""Of each kind: a step of a large model leaves some 10 KB."""


@dataclass(slots=True)
class Step:
    """One recorded step. `context`: tokens that a request had before it, on average. `begin` and `end`: of the call
    into native code, in ns of `perf_counter_ns`. `stamps`: the counter, [threads, calls, 2]. `host`: seconds by phase
    that the engine spent from this call to the next one; `until`: when that came (0 when none did)."""

    kind: str
    program: str
    n: int
    b: int
    s: int
    context: int
    begin: int
    end: int
    stamps: NDArray[np.int64]
    host: dict[str, float] = field(default_factory=dict)
    until: int = 0


OnKind = Callable[[str, Sequence[Step]], None]


@runtime_checkable
class Stamped(Executor, Protocol):
    """An executor whose kernels leave time stamps, so that they can be profiled."""

    @property
    def threads(self) -> int:
        """Members of the team: each has stamps of its own."""
        ...

    def program_for(self, batch: StepBatch) -> str:
        """Symbol of the program that runs a batch."""
        ...

    def stamp_into(self, stamps: NDArray[np.int64] | None) -> None:
        """Where the next steps write their time stamps, [threads, calls of the program, 2] in C order, which must be
        kept until it is changed again; None: nowhere."""
        ...

    def counter(self) -> Callable[[], int]:
        """Reads the counter that the stamps are of."""
        ...


class Recorder:
    """An executor that is another one, and remembers. `clock` turns the stamps into nanoseconds."""

    def __init__(self, executor: Stamped, table: CallTable, steps: int, on_kind: OnKind) -> None:
        """`on_kind(kind, steps)` is called once for each kind, in a thread of its own when `steps` of it are there, or
        by `close` with those there are. Steps that ended in an error are not recorded."""
        self.pages = executor.pages
        self.clock = Clock(executor.counter())
        self.host: Callable[[], Mapping[str, float]] = dict
        """Seconds that the engine has spent in each of its phases so far; set by who makes the engine."""
        self._executor = executor
        self._buffers = {
            name: np.zeros((executor.threads, len(calls.kernels), 2), np.int64)
            for name, calls in table.programs.items()
        }
        self._steps = steps
        self._on_kind = on_kind
        self._seen: dict[str, list[Step]] = {kind: [] for kind in KINDS}
        self._warm: set[str] = set()
        self._open = set(KINDS)
        self._last: Step | None = None
        self._before: dict[str, float] = {}
        self._reports: list[threading.Thread] = []

    def new_batch(self, function: str = STEP) -> StepBatch:
        return self._executor.new_batch(function)

    def execute(self, batch: StepBatch) -> Outputs:
        """What the executor's own returns, untouched."""
        if self._last is not None:
            self._end_host()
        n, b, s = (batch.sizes.get(name, 0) for name in ("N", "B", "S"))
        kind = "decode" if n == b else "prefill"
        if batch.function != STEP or kind not in self._open:
            return self._executor.execute(batch)
        program = self._executor.program_for(batch)
        buffer = self._buffers[program]
        self._executor.stamp_into(buffer)
        try:
            begin = time.perf_counter_ns()
            outputs = self._executor.execute(batch)
            end = time.perf_counter_ns()
        finally:
            self._executor.stamp_into(None)
        if kind not in self._warm:
            self._warm.add(kind)
            return outputs
        context = int(batch["pos"][batch["start"][:b]].sum()) // b
        step = Step(kind, program, n, b, s, context, begin, end, buffer.copy())
        self._seen[kind].append(step)
        self._last, self._before = step, dict(self.host())
        return outputs

    def _end_host(self) -> None:
        """The engine has come back for another step: what it did since the last one is known."""
        step = self._last
        assert step is not None
        self._last = None
        now = self.host()
        # The phase of the call itself is booked only after it; the call has its own times.
        step.host = {k: v - self._before.get(k, 0.0) for k, v in now.items() if k != "execute"}
        step.until = time.perf_counter_ns()
        if len(self._seen[step.kind]) == self._steps:
            self._open.discard(step.kind)
            report = threading.Thread(
                target=self._on_kind, args=(step.kind, self._seen[step.kind]), name="xllm-profile"
            )
            self._reports.append(report)
            report.start()

    def close(self) -> None:
        self._executor.close()
        for report in self._reports:
            report.join()
        for kind in KINDS:
            if kind in self._open:
                self._open.discard(kind)
                self._on_kind(kind, self._seen[kind])
