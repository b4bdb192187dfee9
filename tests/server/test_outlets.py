"""A log that nobody reads does not stop the server, and fatal signals leave a trace."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from xllm_compiler.runtime.server import outlets
from xllm_compiler.runtime.server.outlets import Outlet

SERVE = Path(sys.executable).parent / "xllm-serve"


def full_pipe() -> tuple[int, int]:
    """A pipe into which nothing more fits."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    try:
        while True:
            os.write(write, b"x" * 4096)
    except BlockingIOError:
        os.set_blocking(write, True)
    return read, write


def empty(fd: int, until: Callable[[bytes], bool]) -> bytes:
    """Read until `until` holds of what came."""
    data, end = b"", time.monotonic() + 10
    os.set_blocking(fd, False)
    while not until(data) and time.monotonic() < end:
        try:
            data += os.read(fd, 65536)
        except BlockingIOError:
            time.sleep(0.01)
    return data


def test_lines_arrive_whole_and_in_order() -> None:
    read, write = os.pipe()
    out = Outlet(write, "test")

    def tell(name: str) -> None:
        for i in range(200):
            print(f"{name} {i}", file=out, flush=True)

    threads = [threading.Thread(target=tell, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    lines = empty(read, lambda data: data.count(b"\n") == 600).decode().splitlines()
    for name in "abc":
        assert [line for line in lines if line.startswith(name)] == [f"{name} {i}" for i in range(200)]
    out.write("no newline")
    out.drain(1)
    assert os.read(read, 100) == b"no newline"
    print("\ud800 \U0001f600 " + "y" * 100_000, file=out)  # neither a bad character nor a long line is a trouble
    assert len(empty(read, lambda data: data.endswith(b"\n"))) > 100_000
    assert out.dropped == 0


def test_what_nobody_reads_is_dropped_counted_and_said() -> None:
    read, write = full_pipe()
    out = Outlet(write, "test")
    begun = time.monotonic()
    for i in range(10_000):
        print(f"line {i}", file=out, flush=True)
    out.drain(0.1)
    assert time.monotonic() - begun < 2
    assert 10_000 - outlets._MOST_PIECES - 1 <= out.dropped < 10_000
    data = empty(read, lambda data: b"dropped here" in data and data.endswith(b"\n"))
    assert f"{out.dropped} lines were dropped here".encode() in data
    assert b"line 0\n" in data and b"line 4000\n" in data
    print("and on", file=out)
    assert empty(read, lambda data: b"and on" in data)


def test_a_reader_that_is_gone_is_no_trouble() -> None:
    read, write = os.pipe()
    out = Outlet(write, "test")
    os.close(read)
    print("x", file=out)
    out.drain(1)
    print("y", file=out)


def start(stdout: Any, stderr: Any, artifact: Path, *flags: str, **options: Any) -> tuple[subprocess.Popen[bytes], str]:
    """A server whose address is known beforehand, since its output cannot be read."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [SERVE, artifact, "--port", str(port), "--threads", "1", *flags]
    process = subprocess.Popen(command, stdout=stdout, stderr=stderr, **options)
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + 30
    while time.monotonic() < end and process.poll() is None:
        try:
            httpx.get(url + "/version")
            return process, url
        except httpx.TransportError:
            time.sleep(0.05)
    process.kill()
    raise AssertionError(f"the server did not start: {process.wait()}")


@pytest.mark.parametrize("which", ["stderr", "stdout", "both"])
def test_a_full_pipe_stops_neither_the_start_nor_requests_nor_the_end(real_artifact: Path, which: str) -> None:
    read, write = full_pipe()
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    streams.update({name: write for name in ("stdout", "stderr") if which in (name, "both")})
    process, url = start(artifact=real_artifact, **streams)
    try:
        with httpx.Client(base_url=url) as client:
            for _ in range(1000):
                assert client.get("/health").status_code == 200
            assert "xllm:log_lines_dropped_total" in client.get("/metrics").text
        begun = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0 and time.monotonic() - begun < 5
    finally:
        process.kill()
        os.close(read)
        os.close(write)


@pytest.mark.parametrize("closed", [(1, 2), (0, 1, 2), (2,)], ids=str)
def test_streams_that_were_closed_from_the_start(real_artifact: Path, closed: tuple[int, ...]) -> None:
    def close() -> None:
        for fd in closed:
            os.close(fd)

    process, url = start(None, None, real_artifact, preexec_fn=close)
    assert httpx.post(url + "/v1/completions", json={"prompt": "a", "max_tokens": 2}).status_code == 200
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0


def test_a_reader_that_leaves_is_no_trouble_to_the_server(real_artifact: Path) -> None:
    read, write = os.pipe()
    process, url = start(write, write, real_artifact)
    os.close(write)
    os.close(read)
    assert httpx.post(url + "/v1/completions", json={"prompt": "a", "max_tokens": 2}).status_code == 200
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0


@pytest.mark.parametrize("sig", [signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT])
def test_fatal_signals_leave_a_trace(real_artifact: Path, tmp_path: Path, sig: signal.Signals) -> None:
    with (tmp_path / "log").open("w") as log:
        process, _ = start(subprocess.DEVNULL, log, real_artifact)
    while not (tmp_path / "log").stat().st_size:
        time.sleep(0.01)
    process.send_signal(sig)
    assert process.wait(10) == -sig
    text = (tmp_path / "log").read_text()
    assert "Fatal Python error" in text and "most recent call first" in text
    assert text.startswith("20")  # what was there before is there still


def test_a_fatal_signal_does_not_wait_for_a_full_pipe(real_artifact: Path) -> None:
    read, write = full_pipe()
    process, _ = start(subprocess.DEVNULL, write, real_artifact)
    process.send_signal(signal.SIGSEGV)
    assert process.wait(10) == -signal.SIGSEGV
    os.close(read)
    os.close(write)
