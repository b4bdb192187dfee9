"""Times the phases of a start. They add up to the wall time, since each phase ends where the next begins."""

from __future__ import annotations

import os
import time
from pathlib import Path


def process_age() -> float:
    """Seconds since this process was started, from /proc (to a clock tick, 10 ms); 0.0 where that cannot be read."""
    try:
        stat = Path("/proc/self/stat").read_text()
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except OSError:
        return 0.0
    started = int(stat.rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return max(0.0, uptime - started)


class Phases:
    """`mark(name)` ends the phase `name`, which began at the mark before, or at `began`."""

    def __init__(self, began: float | None = None) -> None:
        """`began`: on `time.monotonic()`'s clock; now when None."""
        self._began = time.monotonic() if began is None else began
        self._last = self._began
        self.rows: list[tuple[str, float]] = []

    @classmethod
    def since_process_start(cls) -> Phases:
        return cls(time.monotonic() - process_age())

    def mark(self, name: str) -> None:
        now = time.monotonic()
        self.rows.append((name, now - self._last))
        self._last = now

    @property
    def total(self) -> float:
        """Seconds from the beginning to the last mark."""
        return self._last - self._began

    def table(self) -> str:
        width = max([len(name) for name, _ in self.rows] + [5])
        lines = [f"{name:<{width}}  {seconds:8.3f} s" for name, seconds in self.rows]
        return "\n".join([*lines, f"{'total':<{width}}  {self.total:8.3f} s"])
