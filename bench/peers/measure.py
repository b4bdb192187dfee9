"""The interleaved run: rounds; in a round, format by format, every row of every peer once, limits in between.

Owns the order and the clock. All peers of a format are loaded together, so that the figures that are compared lie
seconds apart; a row that has fewer samples comes first, so a run that is cut short has something of everything.
"""

from __future__ import annotations

import datetime
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peers.catalog import OFFLINE, WORKERS, Peer
from peers.environments import Place
from peers.pool import Pool, Worker, WorkerError, busy_seconds
from peers.shape import PROMPT, Row
from peers.store import CLEAN, Store

UNKNOWN_PEAK = 5 << 30
"""What a worker is expected to need before it has been seen."""
ANSWER_TIMEOUT = 420.0


@dataclass(frozen=True)
class Entry:
    """A peer in one format, ready to be started."""

    peer: Peer
    form: str
    place: Place
    model: Path
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.peer.name} {self.form}"


class OutOfTime(Exception):
    """The budget is spent."""


class Bench:
    """Everything that a run needs to know."""

    def __init__(self, store: Store, logs: Path, threads: int, vocab: int, budget: float, say: Callable[[str], None]):
        self.store, self.logs, self.threads, self.vocab, self.say = store, logs, threads, vocab, say
        self.deadline = time.monotonic() + budget
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        self.pool = Pool(budget=int(total * 0.75))
        # distinct over runs too, so that no prefix cache on disk or in memory has seen a prompt before
        self._seeds = itertools.count(int(time.time()) % 1_000_000 * 1000)
        self._warm: set[tuple[str, str]] = set()
        self._gave_up: set[tuple[str, str]] = set()
        self._took: dict[tuple[str, str], float] = {}
        self._probe: Worker | None = None

    def environment(self, peer: Peer | None, place: Place | None) -> dict[str, str]:
        """Of a worker: threads limited in every way that libraries look at."""
        cores = sorted(os.sched_getaffinity(0))[: self.threads]
        names = {"threads": str(self.threads), "cores": ",".join(map(str, cores))}
        names["place"] = str(place.folder) if place is not None else ""
        count = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(self.threads))
        settings = {key: value.format(**names) for key, value in (peer.settings if peer else {}).items()}
        return {**os.environ, **OFFLINE, **count, "PYTHONNOUSERSITE": "1", **settings}

    def probe(self, round_index: int) -> None:
        """Read the machine's limits."""
        if self._probe is None or not self._probe.alive:
            command = [sys.executable, str(WORKERS / "probe.py"), json.dumps({"threads": self.threads})]
            self._probe = Worker(command, self.environment(None, None), self.logs / "probe.log")
            self._probe.wait(120)
        reading, others, _ = self._observed(self._probe, lambda worker: worker.ask({}, 120))
        self.store.data["limits"].append({"round": round_index, "at": _now(), "others": round(others, 2), **reading})
        self.store.save()

    def _observed(self, worker: Worker, ask: Callable[[Worker], dict[str, Any]]) -> tuple[dict[str, Any], float, float]:
        """(answer, cores that other processes used meanwhile, seconds)."""
        before, own, start = busy_seconds(), worker.cpu_seconds, time.perf_counter()
        answer = ask(worker)
        seconds = time.perf_counter() - start
        others = (busy_seconds() - before - (worker.cpu_seconds - own)) / seconds
        return answer, max(0.0, others), seconds

    def run(self, entries: Sequence[Entry], rows: Sequence[Row], rounds: int) -> None:
        """Until every row of every entry has `rounds` samples, or the budget is spent."""
        try:
            for index in range(rounds):
                for form in dict.fromkeys(entry.form for entry in entries):
                    self._block([entry for entry in entries if entry.form == form], rows, index)
        except OutOfTime:
            self.say("the budget is spent")
        finally:
            self.pool.close()
            if self._probe is not None:
                self._probe.kill()

    def _lacks(self, entry: Entry, row: Row, index: int) -> bool:
        have = len(self.store.samples(entry.peer.name, entry.form, row.name))
        return have <= index // entry.peer.every and (entry.name, row.name) not in self._gave_up

    def _block(self, entries: Sequence[Entry], rows: Sequence[Row], index: int) -> None:
        """One round of one format. Where one is missing, all are started: starts are measured in every round."""
        lacking = [entry for entry in entries if any(self._lacks(entry, row, index) for row in rows)]
        if not lacking:
            return
        self.probe(index)
        for entry in lacking:
            try:
                self._start(entry, [row for row in rows if row.kind in ("start", "memory")], index)
            except WorkerError as error:
                for row in rows:
                    self._failed(entry, row, f"does not start: {error}")
        for row in rows:
            if row.kind in ("start", "memory"):
                continue
            for entry in lacking:
                if self._lacks(entry, row, index):
                    self._row(entry, row, index)
            self.probe(index)
        for entry in lacking:
            self.pool.drop(entry.name)

    def _in_time(self, key: tuple[str, str]) -> None:
        if time.monotonic() + self._took.get(key, 0.0) > self.deadline:
            raise OutOfTime

    def _note(self, entry: Entry, row: Row, index: int, value: float, others: float, seconds: float) -> None:
        sample = {"round": index, "at": _now(), "value": value, "others": round(others, 2), "took": round(seconds, 2)}
        self.store.add(entry.peer.name, entry.form, row.name, sample)
        mark = "" if others <= CLEAN else f"   ({others:.2f} cores used by others)"
        self.say(f"round {index + 1}  {entry.name:28} {row.name:13} {value:9.2f}{mark}")

    def _failed(self, entry: Entry, row: Row, why: str) -> None:
        why = why.replace(str(Path.cwd()), ".").replace(str(Path.home()), "~")
        self.store.fail(entry.peer.name, entry.form, row.name, why)
        self._gave_up.add((entry.name, row.name))
        self.say(f"         {entry.name:28} {row.name:13} failed: {why}")

    def _start(self, entry: Entry, rows: Sequence[Row], index: int) -> Worker:
        """A fresh process: its start and its memory with one request are figures, and it stays for the rows.

        Raises WorkerError, the process being gone."""
        self._in_time((entry.name, "start"))
        self.pool.drop(entry.name)
        self._warm = {key for key in self._warm if key[0] != entry.name}
        seen = self.store.data.setdefault("peaks", {}).get(entry.name, UNKNOWN_PEAK)
        self.pool.make_room(seen)
        _cache_pages(entry.model)
        wanted = {row.kind: row for row in rows if self._lacks(entry, row, index)}
        begun = time.monotonic()
        worker: Worker | None = None
        try:
            if entry.peer.cold_command is not None and wanted:
                self._start_command(entry, wanted, index)
                wanted = {}
            worker = self._launch(entry)
            worker.wait(entry.peer.start_timeout)
            worker.ask(self._request("prefill", length=PROMPT), entry.peer.start_timeout)
            seconds = time.perf_counter() - worker.started
            others = max(0.0, busy_seconds() - worker.busy - worker.cpu_seconds) / seconds
            if "start" in wanted:
                self._note(entry, wanted["start"], index, seconds, others, seconds)
            if "memory" in wanted:
                worker.ask(self._request("decode", batch=1, prompt=PROMPT, new=48), entry.peer.start_timeout)
                self._note(entry, wanted["memory"], index, worker.peak_bytes / 1e9, others, seconds)
        except WorkerError:
            if worker is not None:
                worker.kill()
            raise
        finally:
            self._took[entry.name, "start"] = time.monotonic() - begun
        self.pool.add(entry.name, worker)
        return worker

    def _launch(self, entry: Entry) -> Worker:
        python = sys.executable if entry.peer.environment is None else str(entry.place.python)
        options = {"model": str(entry.model), "threads": self.threads, "vocab": self.vocab, **entry.options}
        command = [python, str(WORKERS / entry.peer.worker), json.dumps(options)]
        log = self.logs / f"{entry.name.replace(' ', '-')}.log"
        return Worker(command, self.environment(entry.peer, entry.place), log)

    def _start_command(self, entry: Entry, wanted: dict[str, Row], index: int) -> None:
        """The peer's own program from its start to its end, which comes right after its first token."""
        assert entry.peer.cold_command is not None
        command = entry.peer.cold_command(entry.place, entry.model, self.threads)
        before, start = busy_seconds(), time.perf_counter()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=self.environment(entry.peer, entry.place),
        )
        alarm = threading.Timer(entry.peer.start_timeout, process.kill)
        alarm.start()
        _, status, usage = os.wait4(process.pid, 0)
        alarm.cancel()
        seconds = time.perf_counter() - start
        process.returncode = status
        if status:
            raise WorkerError(f"{Path(command[0]).name} ended with status {status}")
        others = max(0.0, busy_seconds() - before - usage.ru_utime - usage.ru_stime) / seconds
        if "start" in wanted:
            self._note(entry, wanted["start"], index, seconds, others, seconds)
        if "memory" in wanted:
            self._note(entry, wanted["memory"], index, usage.ru_maxrss * 1024 / 1e9, others, seconds)

    def _request(self, op: str, **numbers: int) -> dict[str, Any]:
        return {"op": op, "seed": next(self._seeds), **numbers}

    def _row(self, entry: Entry, row: Row, index: int) -> None:
        self._in_time((entry.name, row.name))
        begun = time.monotonic()
        try:
            worker = self.pool.get(entry.name) or self._start(entry, (), index)
            timeout = max(ANSWER_TIMEOUT, entry.peer.start_timeout)
            if row.kind == "prefill" and (entry.name, row.name) not in self._warm:
                worker.ask(self._request("prefill", length=row.size), timeout)
                self._warm.add((entry.name, row.name))
            if row.kind == "prefill":
                request = self._request("prefill", length=row.size)
            else:
                request = self._request("decode", batch=row.size, prompt=PROMPT, new=row.new)
            answer, others, seconds = self._observed(worker, lambda w: w.ask(request, timeout))
            self.store.data.setdefault("peaks", {})[entry.name] = worker.peak_bytes
            self._note(entry, row, index, answer.get("tokens", row.size) / answer["seconds"], others, seconds)
        except WorkerError as error:
            self._failed(entry, row, str(error))
        finally:
            self._took[entry.name, row.name] = time.monotonic() - begun


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _cache_pages(model: Path) -> None:
    """Read a model's files, so that a start finds them in the page cache."""
    files = [model] if model.is_file() else [path for path in sorted(model.rglob("*")) if path.is_file()]
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass
