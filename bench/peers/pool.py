"""Worker processes: started, asked, put to sleep and ended. Owns processes and memory; must not know what is measured.

A worker that is not being asked is stopped by a signal, so that no spinning thread of one peer takes from another. One
that dies, hangs or is killed for memory raises WorkerError for whoever asked, and hurts nobody else.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TICKS = os.sysconf("SC_CLK_TCK")


class WorkerError(Exception):
    """A worker did not answer; the text says why, in one line."""


def busy_seconds() -> float:
    """CPU seconds that all processes have used, since boot, and that the host took away."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    user, nice, system, _, _, irq, softirq, steal = fields[:8]
    return (user + nice + system + irq + softirq + steal) / TICKS


def group_seconds(group: int) -> float:
    """CPU seconds of all processes of a process group, and of their children that have ended."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[2]) == group:
                total += sum(int(field) for field in fields[11:15])
    return total / TICKS


def available_bytes() -> int:
    """What the kernel thinks that a new process may have without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def _die_with_parent() -> None:
    """A worker asleep would never see that its stdin is closed: have the kernel end it if the runner is killed."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class Worker:
    """One process that speaks the protocol of `workers/protocol.py`."""

    def __init__(self, command: list[str], environment: Mapping[str, str], log: Path) -> None:
        """Start it; `started` is the moment before."""
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        self.started = time.perf_counter()
        self.busy = busy_seconds()
        self._log_size = log.stat().st_size if log.exists() else 0
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=dict(environment),
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        self._rest = b""
        self.peak_bytes = 0
        self.used = time.monotonic()
        # should memory run out, a worker is to go, not the runner or somebody's editor
        with contextlib.suppress(OSError):
            Path(f"/proc/{self._process.pid}/oom_score_adj").write_text("800")

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    @property
    def cpu_seconds(self) -> float:
        """CPU seconds of this worker and its children so far."""
        return group_seconds(self._process.pid)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def wait(self, timeout: float) -> dict[str, Any]:
        """The next answer; raises WorkerError, the worker then being dead."""
        assert self._process.stdout is not None
        descriptor, deadline = self._process.stdout.fileno(), time.monotonic() + timeout
        while b"\n" not in self._rest:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                self.kill()
                raise WorkerError(f"no answer within {timeout:.0f} s")
            data = os.read(descriptor, 1 << 16)
            if not data:
                raise WorkerError(self._obituary())
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        self.peak_bytes = max(self.peak_bytes, int(answer.get("peak_bytes", 0)))
        if "error" in answer:
            raise WorkerError(str(answer["error"]))
        return answer

    def _obituary(self) -> str:
        status = self._process.wait()
        if status == -signal.SIGKILL:
            return "killed by the system, which is what happens when memory runs out"
        with self.log.open("rb") as log:
            log.seek(self._log_size)
            lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
        told = [line for line in lines[-60:] if "rror" in line] or lines[-1:] or [""]
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
        return f"ended with {how}: {told[-1][:200]}"

    def ask(self, request: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        """Wake it, ask, and put it to sleep again."""
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            answer = self.wait(timeout)
        except (BrokenPipeError, OSError) as error:
            raise WorkerError(self._obituary()) from error
        finally:
            self.used = time.monotonic()
            self.sleep()
        return answer

    def sleep(self) -> None:
        """Stop all its threads until it is asked again."""
        if self.alive:
            self._signal(signal.SIGSTOP)

    def kill(self) -> None:
        """End it and its children now."""
        self._signal(signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


@dataclass
class Pool:
    """Workers by name, as many as `budget` bytes allow; the one that has been idle longest makes room."""

    budget: int
    reserve: int = 2 << 30

    def __post_init__(self) -> None:
        self._workers: dict[str, Worker] = {}

    def get(self, name: str) -> Worker | None:
        """The living worker of that name."""
        worker = self._workers.get(name)
        if worker is not None and not worker.alive:
            self.drop(name)
            return None
        return worker

    def add(self, name: str, worker: Worker) -> None:
        self._workers[name] = worker

    def make_room(self, need: int) -> None:
        """End idle workers until `need` bytes fit beside the others."""
        while self._workers:
            held = sum(worker.peak_bytes for worker in self._workers.values())
            if held + need <= self.budget and available_bytes() >= need + self.reserve:
                return
            self.drop(min(self._workers, key=lambda name: self._workers[name].used))

    def drop(self, name: str) -> None:
        """End a worker."""
        worker = self._workers.pop(name, None)
        if worker is not None:
            worker.kill()

    def close(self) -> None:
        """End all."""
        for name in list(self._workers):
            self.drop(name)
