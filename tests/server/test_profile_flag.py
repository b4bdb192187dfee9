"""`xllm-serve --profile-steps`, as somebody who asks why it is slow would use it: a real server, a real client."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai


def ask(url: str) -> str:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    answer = client.completions.create(model="bundled", prompt="def add(a, b):\n", max_tokens=8, temperature=0)
    return answer.choices[0].text


def test_tables_and_trace(real_artifact: Path, start_server: Callable[..., Any], tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    flags = ("--profile-steps", "2", "--profile-trace", str(trace), "--threads", "1")
    server = start_server(real_artifact, *flags).wait_ready()
    answers = {ask(server.url) for _ in range(4)}
    assert server.end() == 0
    said = server.popen.stdout.read()
    for kind in ("prefill", "decode"):
        assert f"profile of {kind}: program" in said
    assert "lm_head" in said and "host: sample" in said
    names = {event["name"] for event in json.loads(trace.read_text())["traceEvents"] if event["ph"] == "X"}
    assert any("attend" in name for name in names)

    plain = start_server(real_artifact, "--threads", "1").wait_ready()
    assert {ask(plain.url)} == answers  # being watched changes nothing
    assert plain.end() == 0


def test_a_server_that_nobody_asked_says_so(real_artifact: Path, start_server: Callable[..., Any]) -> None:
    server = start_server(real_artifact, "--profile-steps", "2").wait_ready()
    assert server.end() == 0
    assert "no decode step" in server.popen.stdout.read()
