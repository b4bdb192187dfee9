"""Where start-up time goes. Owns the clock of phases, the table and the report; must not start anything.

Phases are contiguous: each ends where the next begins and the first begins with the process, so they add up to the wall
time by construction and nothing can hide between them.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

from xllm_compiler.errors import XllmError


def process_age() -> float:
    """Seconds since the kernel started this process (proc(5), field 22 of /proc/self/stat; 10 ms steps)."""
    stat = Path("/proc/self/stat").read_text()
    ticks = int(stat.rpartition(")")[2].split()[19])  # the command name before ")" may itself contain spaces
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))


@dataclass
class PhaseClock:
    """Contiguous phases since the process started."""

    started: float  # on time.monotonic()'s clock
    phases: list[tuple[str, float]] = field(default_factory=list)
    _last: float = 0.0

    @classmethod
    def since_process_start(cls) -> PhaseClock:
        started = time.monotonic() - process_age()
        return cls(started, [], started)

    def end(self, phase: str) -> None:
        """The time since the previous call was `phase`."""
        now = time.monotonic()
        self.phases.append((phase, now - self._last))
        self._last = now

    @property
    def total(self) -> float:
        """Seconds from the process' start to the end of the last phase."""
        return self._last - self.started

    def table(self, title: str) -> str:
        width = max(len(name) for name, _ in self.phases)
        lines = [title]
        lines += [f"  {name:<{width}}  {seconds * 1e3:9.1f} ms" for name, seconds in self.phases]
        lines.append(f"  {'total since process start':<{width}}  {self.total * 1e3:9.1f} ms")
        return "\n".join(lines)

    def write(self, path: str, extra: dict[str, object]) -> None:
        """JSON with the phases in seconds. Raises XllmError("io")."""
        report = {"phases": [{"name": n, "seconds": s} for n, s in self.phases], "total_seconds": self.total, **extra}
        try:
            Path(path).write_text(json.dumps(report, indent=1) + "\n")
        except OSError as error:
            raise XllmError("io", f"cannot write the start-up report: {error}", where=path) from None
