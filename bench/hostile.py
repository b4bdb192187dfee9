"""What one hostile request costs everybody else: `xllm-serve` with 256 streaming clients, and bombs thrown beside them.

    python bench/hostile.py [--quick] [--only WORD] [--clients 256] [--work .cache/bench] [--json FILE]

Quiet windows and windows with a bomb alternate in one run. What a bomb does it does each time, and what the machine
does it does at any time; so a bomb's gap is the smallest over its throws of the longest gap that any other client saw,
and it is judged beside the median of the quiet windows. A bomb that seems too slow is thrown again, up to twice as
often each time. Fails (status 1) on

- a gap between two chunks of another client's stream longer by 50 ms than in quiet windows,
- an answer of /health that takes longer than 100 ms, or that much longer than in quiet windows,
- resident memory beyond what the process had when it began to listen and what its start-up report promises,
- a bomb without an answer, or answered with another status than it should be.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import json
import os
import random
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from hostile_bombs import BOMBS, TEMPLATES, Bomb

ROOT = Path(__file__).resolve().parent.parent
GAP_SECONDS, HEALTH_SECONDS = 0.050, 0.100
QUIET_SECONDS, AFTER_SECONDS = 2.0, 0.3
TOKENS, THINK_SECONDS = 48, (1.0, 7.0)  # of a client: about one in ten streams at any moment
ANSWER_SECONDS = 60.0


class Server:
    """One `xllm-serve` process."""

    def __init__(self, artifact: Path, work: Path, *flags: str) -> None:
        report = work / "hostile-start.json"
        report.unlink(missing_ok=True)
        self.log: IO[str] = (work / "hostile-server.log").open("w")
        command = [str(Path(sys.executable).with_name("xllm-serve")), str(artifact), "--port", "0"]
        self.process = subprocess.Popen(
            [*command, "--startup-report", str(report), "--disable-access-log", *flags],
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )
        assert self.process.stdout is not None
        for line in self.process.stdout:
            found = re.search(r"serving .* on http://127.0.0.1:(\d+)", line)
            if found:
                self.port = int(found[1])
                break
        else:
            raise SystemExit(f"the server ended with {self.process.wait()}; see {self.log.name}")
        time.sleep(1)
        self.promised = sum(json.loads(report.read_text())["memory_bytes"].values())
        self.at_rest = self.rss()

    def _status(self, name: str) -> int:
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(rf"{name}:\s+(\d+) kB", text)
        return int(found[1]) * 1024 if found else 0

    def rss(self) -> int:
        return self._status("VmRSS")

    def peak(self) -> int:
        """Since `forget_peak`."""
        return self._status("VmHWM")

    def forget_peak(self) -> None:
        with contextlib.suppress(OSError):
            Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()


class Crowd:
    """The other clients, in a process of their own."""

    def __init__(self, port: int, clients: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--crowd", str(port), str(clients)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def window(self, start: float, end: float) -> dict[str, float]:
        """The longest gap and health latency, in seconds, and the chunks, between two moments of `time.monotonic()`."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{start} {end}\n")
        self.process.stdin.flush()
        return dict(json.loads(self.process.stdout.readline()))

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@dataclass
class _Seen:
    """What the crowd saw: (end of the gap, its length), and the same of /health. `open`: when each stream in progress
    last said something, so that a gap that is not over yet counts too."""

    gaps: list[tuple[float, float]] = field(default_factory=list)
    health: list[tuple[float, float]] = field(default_factory=list)
    open: dict[int, float] = field(default_factory=dict)
    asked: float = 0.0

    def window(self, start: float, end: float) -> dict[str, float]:
        now = time.monotonic()
        gaps = [length for at, length in self.gaps if at >= start and at - length <= end]
        gaps += [now - since for since in self.open.values() if since <= end]
        health = [length for at, length in self.health if at >= start and at - length <= end]
        if self.asked:
            health.append(now - self.asked)
        return {"gap": max(gaps, default=0.0), "health": max(health, default=0.0), "chunks": len(gaps)}


async def _stream(port: int, number: int, seen: _Seen) -> None:
    source = random.Random(number)
    await asyncio.sleep(source.uniform(0, THINK_SECONDS[1]))
    while True:
        prompt = f"def f{source.randrange(10**6)}(a, b):"
        body = json.dumps(
            {"prompt": prompt, "max_tokens": TOKENS, "ignore_eos": True, "stream": True, "seed": number}
        ).encode()
        head = "POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\nconnection: close"
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(f"{head}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
                await reader.readuntil(b"\r\n\r\n")
                last = time.monotonic()
                while data := await reader.read(65536):
                    now = time.monotonic()
                    seen.gaps.append((now, now - last))
                    last = seen.open[number] = now
                    if b"[DONE]" in data:
                        break
            finally:
                seen.open.pop(number, None)
                writer.close()
        await asyncio.sleep(source.uniform(*THINK_SECONDS))


async def _probe(port: int, seen: _Seen) -> None:
    while True:
        seen.asked = time.monotonic()
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n")
            await reader.read()
            writer.close()
            now = time.monotonic()
            seen.health.append((now, now - seen.asked))
        seen.asked = 0.0
        await asyncio.sleep(0.02)


async def _crowd(port: int, clients: int) -> None:
    seen = _Seen()
    tasks = [asyncio.create_task(_stream(port, number, seen)) for number in range(clients)]
    tasks.append(asyncio.create_task(_probe(port, seen)))
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        start, end = map(float, line.split())
        print(json.dumps(seen.window(start, end)), flush=True)
        seen.gaps = [item for item in seen.gaps if item[0] > end]
        seen.health = [item for item in seen.health if item[0] > end]


def throw(port: int, bomb: Bomb) -> int:
    """Send it on as many connections as it wants; the status that the last one answered, 0 for none (a closed
    connection, which is an answer too, is 1)."""
    sockets = [socket.create_connection(("127.0.0.1", port), ANSWER_SECONDS) for _ in range(bomb.times)]
    answers: list[bytes] = []
    for connection in sockets:
        with contextlib.suppress(ConnectionError):
            for piece in bomb.pieces():
                connection.sendall(piece)
    for connection in sockets:
        answer = b""
        try:
            while data := connection.recv(1 << 20):
                answer = (answer + data)[: 1 << 16]
        except ConnectionError:
            answer = answer or b"HTTP/1.1 1"
        except TimeoutError:
            answer = b"HTTP/1.1 0"
        answers.append(answer or b"HTTP/1.1 1")
        connection.close()
    found = [re.match(rb"HTTP/1.1 (\d+)", answer) for answer in answers]
    return min(int(match[1]) if match else 0 for match in found)


@dataclass
class Result:
    """One bomb's throws; seconds and bytes."""

    bomb: Bomb
    quiet: list[float] = field(default_factory=list)
    quiet_health: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    health: list[float] = field(default_factory=list)
    took: list[float] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    before: int = 0
    after: int = 0
    peak: int = 0
    allowed: int = 0

    def faults(self, quiet: float, quiet_health: float) -> list[str]:
        """Why it fails. `quiet`: medians of this run's quiet windows."""
        out = []
        if min(self.gaps) - quiet > GAP_SECONDS:
            out.append("gap")
        if min(self.health) > max(HEALTH_SECONDS, quiet_health + HEALTH_SECONDS):
            out.append("health")
        if self.peak > self.allowed:
            out.append("memory")
        wrong = [status for status in self.statuses if not self.bomb.right(status)]
        if wrong:
            out.append(f"status {wrong[0]}")
        return out

    def row(self, faults: list[str]) -> str:
        mb = [f"{size / 1e6:.0f}" for size in (self.before, self.peak, self.after, self.allowed)]
        times = [f"{value * 1e3:.0f}" for value in (max(self.quiet), min(self.gaps), max(self.gaps), min(self.health))]
        verdict = f"FAIL: {', '.join(faults)}" if faults else "PASS"
        cells = [self.bomb.name, *times, *mb, str(self.statuses[0]), f"{min(self.took):.1f}", verdict]
        return "| " + " | ".join(cells) + " |"


HEAD = (
    "| bomb | quiet, longest gap (ms) | bomb, longest gap: least | and most of the throws | /health (ms) "
    "| RSS before (MB) | peak | after | allowed | status | answer (s) | |\n|---|" + "---|" * 11
)


def attack(server: Server, crowd: Crowd, result: Result, throws: int) -> None:
    """Quiet windows and throws by turns."""
    bomb = result.bomb
    bomb.build()
    for _ in range(throws):
        start = time.monotonic()
        time.sleep(QUIET_SECONDS)
        seen = crowd.window(start, time.monotonic())
        if not seen["chunks"]:
            raise SystemExit("the other clients see nothing")
        result.quiet.append(seen["gap"])
        result.quiet_health.append(seen["health"])
        server.forget_peak()
        start = time.monotonic()
        result.statuses.append(throw(server.port, bomb))
        result.took.append(time.monotonic() - start)
        time.sleep(AFTER_SECONDS)
        seen = crowd.window(start, time.monotonic())
        result.gaps.append(seen["gap"])
        result.health.append(seen["health"])
        result.peak = max(result.peak, server.peak())
    result.after = server.rss()


def again(server: Server, crowd: Crowd, results: list[Result], throws: int) -> None:
    """More throws of the bombs that are too slow so far: another process may have had the cores."""
    quiet, health = quiet_medians(results)
    for result in results:
        if {"gap", "health"} & set(result.faults(quiet, health)):
            attack(server, crowd, result, throws)
            print(f"  {result.bomb.name}, again: {min(result.gaps) * 1e3:.0f} ms", flush=True)


def quiet_medians(results: list[Result]) -> tuple[float, float]:
    """Of all quiet windows: longest gap and slowest /health, seconds."""
    return (
        statistics.median(value for result in results for value in result.quiet),
        statistics.median(value for result in results for value in result.quiet_health),
    )


def run(server: Server, bombs: list[Bomb], clients: int, throws: int) -> tuple[list[str], list[Result], bool]:
    """The rows of the table, and whether all is well."""
    crowd = Crowd(server.port, clients)
    results: list[Result] = []
    try:
        time.sleep(THINK_SECONDS[1] + 1)
        for bomb in bombs:
            result = Result(bomb, allowed=server.at_rest + server.promised, before=server.rss())
            attack(server, crowd, result, throws)
            results.append(result)
            print(f"  {bomb.name}: {min(result.gaps) * 1e3:.0f} ms, status {result.statuses}", flush=True)
        for more in (throws, 2 * throws):
            again(server, crowd, results, more)
    finally:
        crowd.end()
    quiet, health = quiet_medians(results)
    verdicts = [result.faults(quiet, health) for result in results]
    rows = [result.row(faults) for result, faults in zip(results, verdicts, strict=True)]
    print(f"quiet windows, {clients} clients: longest gap, median {quiet * 1e3:.0f} ms; /health {health * 1e3:.0f} ms")
    return rows, results, not any(verdicts)


def main() -> int:
    """Start, throw, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three throws of each bomb instead of six")
    parser.add_argument("--only", default="", help="bombs with this word in their name")
    parser.add_argument("--clients", type=int, default=256)
    parser.add_argument("--work", type=Path, default=Path(".cache/bench"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    tool = str(Path(sys.executable).with_name("xllm-compile"))
    command = [tool, str(ROOT / "models" / "bundled"), "--cache-dir", str(work / "cache")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    artifact = Path(done.stdout.strip().splitlines()[-1])
    throws = 3 if options.quick else 6
    rows: list[str] = []
    results: list[Result] = []
    fine = True
    bombs = [bomb for bomb in BOMBS if options.only in bomb.name]
    if bombs:
        server = Server(artifact, work)
        try:
            rows, results, fine = run(server, bombs, options.clients, throws)
        finally:
            server.end()
    for template in TEMPLATES:  # one that a checkpoint could bring, on a server of its own
        if options.only not in template.name:
            continue
        with tempfile.NamedTemporaryFile("w", suffix=".jinja") as file:
            file.write(template.template)
            file.flush()
            server = Server(artifact, work, "--chat-template", file.name)
            try:
                more, last, good = run(server, [template], options.clients, throws)
            finally:
                server.end()
        rows, results, fine = rows + more, results + last, fine and good
    print(f"\n{datetime.date.today()}  `python bench/hostile.py`  {len(os.sched_getaffinity(0))} cores\n\n{HEAD}")
    print("\n".join(rows))
    print("PASS" if fine else "FAIL")
    if options.json:
        record: list[dict[str, Any]] = [
            {name: value for name, value in vars(result).items() if name != "bomb"} | {"name": result.bomb.name}
            for result in results
        ]
        options.json.write_text(json.dumps(record, indent=1))
    return 0 if fine else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--crowd"]:
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(_crowd(int(sys.argv[2]), int(sys.argv[3])))
    else:
        sys.exit(main())
