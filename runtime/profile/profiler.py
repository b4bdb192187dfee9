"""From a wish to profile to tables and a trace. Owns the order: wrap the executor, watch the engine, report."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from xllm_compiler.artifact import CALLS
from xllm_compiler.artifact.calls import CallTable, read_calls
from xllm_compiler.errors import XllmError
from xllm_compiler.runtime.engine import Engine
from xllm_compiler.runtime.executor import Executor
from xllm_compiler.runtime.loader import LoadedArtifact
from xllm_compiler.runtime.profile.record import MAX_STEPS, Recorder, Stamped, Step
from xllm_compiler.runtime.profile.table import Peaks, Profile, profiles, show
from xllm_compiler.runtime.profile.trace import write_trace


class Profiler:
    """For one engine: `prepare_engine` calls `wrap` and `watch`. `found`: the profiles of the kinds that are done."""

    def __init__(
        self,
        steps: int,
        tell: Callable[[str], None],
        *,
        trace: Path | None = None,
        peaks: Peaks | None = None,
    ) -> None:
        """`tell` gets a table, or an error, as text, in a thread of its own. `trace`: a file that is written anew after
        each kind. Raises XllmError("option") for a number of steps that is not within 1 to MAX_STEPS."""
        if not 1 <= steps <= MAX_STEPS:
            raise XllmError("option", f"--profile-steps must be within 1 and {MAX_STEPS}, got {steps}")
        self.found: list[Profile] = []
        self._steps, self._tell, self._trace, self._peaks = steps, tell, trace, peaks
        self._lock = threading.Lock()
        self._traced: list[Step] = []
        self._table: CallTable
        self._recorder: Recorder
        self._about: dict[str, str] = {}

    def wrap(self, artifact: LoadedArtifact, executor: Executor) -> Recorder:
        """What the engine is to run steps on. Raises XllmError("artifact"), and ("option") for an executor that leaves
        no time stamps."""
        if not isinstance(executor, Stamped) or CALLS not in artifact.manifest.files:
            kind = artifact.manifest.target.kind
            raise XllmError(
                "option",
                f"steps of target {kind} cannot be profiled: its kernels leave no time stamps",
                help="serve it without --profile-steps",
            )
        self._table = read_calls(artifact.path, artifact.manifest)
        self._about = {"model": artifact.manifest.model.name, "artifact": artifact.manifest.id, "code": artifact.level}
        self._recorder = Recorder(executor, self._table, self._steps, self._on_kind)
        return self._recorder

    def watch(self, engine: Engine) -> None:
        """Whose time between steps is meant."""
        self._recorder.host = lambda: engine.stats().step_seconds

    def _on_kind(self, kind: str, steps: Sequence[Step]) -> None:
        with self._lock:
            try:
                if not steps:
                    self._tell(f"profile: no {kind} step after the first one, which only warms up")
                    return
                found = profiles(steps, self._table, self._recorder.clock, self._recorder.pages, self._peaks)
                self.found += found
                for profile in found:
                    self._tell("profile of " + show(profile))
                if self._trace is not None:
                    self._traced += steps
                    write_trace(self._trace, self._traced, self._table, self._recorder.clock, self._about)
            except XllmError as error:
                self._tell(str(error))
