"""Which signals drain, which end the server at once, and when."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

LONG = {
    "prompt": "x",
    "max_tokens": 300,
    "ignore_eos": True,
    "stream": True,
    "stream_options": {"include_usage": True},
}


def run_through(process: Any, *signals: signal.Signals) -> tuple[int, str]:
    """Send the signals while an answer runs: how many tokens came, and the last line."""
    lines = []
    with httpx.stream("POST", process.url + "/v1/completions", json=LONG, timeout=20) as answer:
        for line in answer.iter_lines():
            lines += [line] if line else []
            if line and len(lines) == 3:
                for sig in signals:
                    process.popen.send_signal(sig)
                    time.sleep(0.02)
    return json.loads(lines[-2].removeprefix("data: "))["usage"]["completion_tokens"], lines[-1]


@pytest.mark.parametrize(
    "signals",
    [
        (signal.SIGTERM,),
        (signal.SIGINT,),
        (signal.SIGHUP,),
        (signal.SIGHUP, signal.SIGHUP),
        (signal.SIGTERM, signal.SIGHUP),
    ],
    ids=lambda signals: "-".join(sig.name for sig in signals),
)
def test_running_answers_finish(real_artifact: Path, start_server: Any, signals: Any) -> None:
    process = start_server(real_artifact, "--threads", "1").wait_ready()
    assert run_through(process, *signals) == (300, "data: [DONE]")
    assert process.popen.wait(10) == 0
    assert f"{signals[0].name}: draining 1 running requests" in process.log.read_text()


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(real_artifact: Path, start_server: Any, second: signal.Signals) -> None:
    process = start_server(real_artifact, "--threads", "1").wait_ready()
    with pytest.raises(httpx.RemoteProtocolError):
        run_through(process, signal.SIGHUP, second)
    assert process.popen.wait(10) == 128 + second


def test_under_nohup_a_closed_terminal_is_nothing(real_artifact: Path, start_server: Any) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # inherited by what is started now
    try:
        process = start_server(real_artifact, "--threads", "1")
    finally:
        signal.signal(signal.SIGHUP, before)
    process.wait_ready()
    assert run_through(process, signal.SIGHUP) == (300, "data: [DONE]")
    assert httpx.get(process.url + "/health").status_code == 200
    assert process.end() == 0


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("after", [0.2, 0.4])
def test_a_start_ends_when_told(real_artifact: Path, start_server: Any, sig: signal.Signals, after: float) -> None:
    process = start_server(real_artifact)
    time.sleep(after)
    begun = time.monotonic()
    code = process.end(sig)
    # 0: it was serving already; on a slow machine the interpreter itself may yet be starting
    assert code in (-sig, 128 + sig, 0) or (code == 1 and "init_import_site" in process.log.read_text())
    assert time.monotonic() - begun < 3


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_a_compile_ends_with_the_server(tmp_path: Path, start_server: Any, sig: signal.Signals) -> None:
    bundled = Path(__file__).resolve().parents[2] / "models" / "bundled"
    process = start_server(bundled, "--cache-dir", str(tmp_path), blocked=False)
    pid = process.popen.pid
    children: list[str] = []
    end = time.monotonic() + 20
    while not children and time.monotonic() < end:
        time.sleep(0.05)
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    time.sleep(1.0)  # it starts python and says that it wants to end with us
    process.end(sig, 5)
    while (alive := [child for child in children if running(child)]) and time.monotonic() < end:
        time.sleep(0.05)
    assert children and not alive


def running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_limits_and_what_was_dropped_are_published(real_server: Any) -> None:
    text = httpx.get(real_server.url + "/metrics").text
    for name in ("arriving_bytes_limit", "arriving_bytes_peak", "arriving_given_up_total", "log_lines_dropped_total"):
        assert f"xllm:{name}{{" in text
    assert any(line.startswith("limits: 128.0 MiB of arriving requests") for line in real_server.lines)


def test_who_may_call_a_server_as_it_starts(real_artifact: Path, start_server: Any, tmp_path: Path) -> None:
    """The flags reach the door."""
    keys = tmp_path / "keys"
    keys.write_text("from-file\n")
    flags = [
        "--api-key-file",
        str(keys),
        "--allowed-hosts",
        "api.example.com",
        "--allowed-origins",
        '["https://a.example"]',
    ]
    process = start_server(real_artifact, "--threads", "1", *flags, XLLM_API_KEY="from-env").wait_ready()
    url = process.url + "/v1/models"
    for key, status in (("from-file", 200), ("from-env", 200), ("y", 401), ("x", 401)):
        assert httpx.get(url, headers={"authorization": f"Bearer {key}"}).status_code == status
    key = {"authorization": "Bearer from-file"}
    for host, status in (("api.example.com", 200), ("evil.example", 403), ("localhost", 200)):
        assert httpx.get(url, headers={**key, "host": host}).status_code == status
    for origin, status in (("https://a.example", 200), ("http://localhost:3000", 400)):
        asks = {"origin": origin, "access-control-request-method": "POST"}
        assert httpx.options(url, headers=asks).status_code == status
    assert "read by every user" in process.log.read_text()
    assert process.end() == 0
