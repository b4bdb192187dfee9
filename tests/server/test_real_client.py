"""`xllm-serve` as users meet it: a process of its own with the bundled model, and the `openai` package as the client.

Every server here runs where importing torch, transformers or TVM fails.
"""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

PROMPT = "def add(a, b):\n    "


@pytest.fixture
def client(real_server: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=real_server.url + "/v1", api_key="none", max_retries=0, timeout=60)


def gauge(server: Any, name: str) -> float:
    for family in text_string_to_metric_families(httpx.get(server.url + "/metrics").text):
        for sample in family.samples:
            if sample.name == name:
                return float(sample.value)
    raise AssertionError(name)


def test_the_model_is_listed(client: openai.OpenAI) -> None:
    (card,) = client.models.list().data
    assert client.models.retrieve(card.id).id == card.id
    assert card.model_extra is not None and card.model_extra["max_model_len"] > 0


def test_chat_streamed_and_whole_are_the_same(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {
        "model": "bundled",
        "messages": [{"role": "user", "content": "Write a function."}],
        "max_completion_tokens": 24,
        "temperature": 0,
    }
    whole = client.chat.completions.create(**ask)
    assert whole.usage is not None and whole.usage.completion_tokens <= 24
    chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage


def test_a_hang_up_in_the_middle_frees_the_pages(client: openai.OpenAI, real_server: Any, until: Any) -> None:
    stream = client.completions.create(
        model="bundled", prompt=PROMPT, max_tokens=1500, stream=True, extra_body={"ignore_eos": True}
    )
    for _ in range(3):
        next(iter(stream))
    assert gauge(real_server, "vllm:kv_cache_usage_perc") > 0
    stream.close()
    assert until(lambda: gauge(real_server, "vllm:kv_cache_usage_perc") == 0, 2)
    assert gauge(real_server, "vllm:num_requests_running") == 0


def test_logprobs_of_chat_and_completions_agree(client: openai.OpenAI, real_server: Any) -> None:
    messages: Any = [{"role": "user", "content": "hi"}]
    chat = client.chat.completions.create(
        model="bundled", messages=messages, max_tokens=4, temperature=0, logprobs=True, top_logprobs=3
    )
    assert chat.choices[0].logprobs is not None and chat.choices[0].logprobs.content is not None
    tokens = httpx.post(real_server.url + "/tokenize", json={"messages": messages}).json()["tokens"]
    plain = client.completions.create(model="bundled", prompt=tokens, max_tokens=4, temperature=0, logprobs=3)
    assert plain.choices[0].logprobs is not None
    assert plain.choices[0].logprobs.token_logprobs == [e.logprob for e in chat.choices[0].logprobs.content]
    assert plain.choices[0].logprobs.tokens == [e.token for e in chat.choices[0].logprobs.content]
    for entry in chat.choices[0].logprobs.content:
        assert entry.top_logprobs[0].logprob == entry.logprob  # greedy: the chosen one is the likeliest
        assert [t.logprob for t in entry.top_logprobs] == sorted((t.logprob for t in entry.top_logprobs), reverse=True)


def test_echoed_logprobs_are_those_of_generation(client: openai.OpenAI, real_server: Any) -> None:
    """What the model said of its own tokens while it made them, it says again when it reads them, bit for bit."""
    made = client.completions.create(
        model="bundled", prompt=PROMPT, max_tokens=20, temperature=0, logprobs=1, extra_body={"return_token_ids": True}
    )
    extra: Any = made.choices[0].model_extra
    ids = extra["prompt_token_ids"] + extra["token_ids"]
    read = client.completions.create(model="bundled", prompt=ids, max_tokens=0, echo=True, logprobs=1)
    first, second = made.choices[0].logprobs, read.choices[0].logprobs
    assert first is not None and second is not None
    assert first.token_logprobs is not None and second.token_logprobs is not None
    assert second.token_logprobs[0] is None
    assert second.token_logprobs[-len(first.token_logprobs) :] == first.token_logprobs
    assert read.choices[0].text.startswith(PROMPT)


def test_choices_and_seeds(client: openai.OpenAI) -> None:
    def draw(seed: int) -> list[str]:
        answer = client.completions.create(
            model="bundled", prompt=PROMPT, max_tokens=12, n=3, seed=seed, temperature=1.0, top_p=1.0
        )
        return [choice.text for choice in answer.choices]

    assert draw(7) == draw(7)
    assert len(set(draw(7))) > 1  # the choices of one request differ
    assert draw(7) != draw(8)


def test_batched_prompts_and_stop_strings(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="bundled", prompt=[PROMPT, "import os\n"], max_tokens=30, temperature=0, stop=["\n"]
    )
    alone = client.completions.create(model="bundled", prompt="import os\n", max_tokens=30, temperature=0, stop=["\n"])
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert all("\n" not in choice.text for choice in answer.choices)
    assert answer.choices[1].text == alone.choices[0].text


def test_the_client_s_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="gpt-4"):
        client.completions.create(model="gpt-4", prompt="x")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="bundled", prompt="x", temperature=-1)
    with pytest.raises(openai.BadRequestError, match="maximum context length") as caught:
        client.completions.create(model="bundled", prompt="x " * 5000)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(
            model="bundled",
            messages=[{"role": "user", "content": "x"}],
            tools=[{"type": "function", "function": {"name": "f"}}],
        )


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"prompt": "a"', 400),
        (b'{"prompt": "\xff"}', 400),
        (b'{"prompt": "a", "temperature": NaN}', 400),
        (b'{"prompt": "a", "colour": 1}', 400),
        (b'{"prompt": "' + b"a" * 10_000_000 + b'"}', 413),
        (b"[" * 100_000, 400),
    ],
)
def test_bad_bodies_and_still_serving(real_server: Any, body: bytes, status: int) -> None:
    answer = httpx.post(real_server.url + "/v1/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == status and answer.json()["error"]["message"]
    assert httpx.post(real_server.url + "/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200


def test_a_thousand_connections_that_send_nothing(real_server: Any, until: Any) -> None:
    host, port = real_server.url.removeprefix("http://").split(":")
    before = gauge(real_server, "xllm:connections_timed_out_total")
    socks = [socket.create_connection((host, int(port)), 10) for _ in range(1000)]
    answer = httpx.post(real_server.url + "/v1/completions", json={"prompt": "a", "max_tokens": 1}, timeout=10)
    assert answer.status_code == 200
    # --timeout-receive 3
    assert until(lambda: gauge(real_server, "xllm:connections_timed_out_total") - before == 1000, 20)
    for sock in socks:
        sock.close()


def test_the_start_up_table_adds_up_to_the_wall_time(real_artifact: Path, start_server: Any, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    server = start_server(real_artifact, "--startup-report", str(path)).wait_ready()
    wall = time.monotonic() - server.began
    report = json.loads(path.read_text())
    assert sum(phase["seconds"] for phase in report["phases"]) == pytest.approx(report["total_seconds"])
    assert report["total_seconds"] == pytest.approx(wall, abs=0.25)
    assert any(line.startswith("total") for line in server.lines)
    assert {"start python", "load artifact", "listen"} <= {phase["name"] for phase in report["phases"]}
    assert report["address"] == server.url
    assert server.end() == 0


def test_sigterm_finishes_what_runs_and_ends_with_0(real_artifact: Path, start_server: Any) -> None:
    server = start_server(real_artifact).wait_ready()
    ask = {"prompt": PROMPT, "max_tokens": 1200, "n": 2, "ignore_eos": True, "stream": True}
    lines = []
    with httpx.stream("POST", server.url + "/v1/completions", json=ask, timeout=60) as answer:
        for line in answer.iter_lines():
            if not line:
                continue
            lines.append(line)
            if len(lines) == 3:
                server.popen.send_signal(signal.SIGTERM)
                time.sleep(0.1)
                new = httpx.post(server.url + "/v1/completions", json={"prompt": "a"})
                assert new.status_code == 503 and new.json()["error"]["code"] == "draining"
                assert httpx.get(server.url + "/health").status_code == 503
    assert lines[-1] == "data: [DONE]"
    reasons = [json.loads(line[6:])["choices"][0]["finish_reason"] for line in lines[:-1]]
    assert reasons.count("length") == 2 and reasons.count(None) == len(reasons) - 2
    assert server.popen.wait(20) == 0


def test_a_second_signal_ends_at_once(real_artifact: Path, start_server: Any) -> None:
    server = start_server(real_artifact).wait_ready()
    ask = {"prompt": PROMPT, "max_tokens": 1900, "n": 8, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", server.url + "/v1/completions", json=ask, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        server.popen.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        assert server.popen.poll() is None
        server.popen.send_signal(signal.SIGTERM)
        assert server.popen.wait(2) == 128 + signal.SIGTERM


def test_an_idle_server_ends_soon(real_artifact: Path, start_server: Any) -> None:
    server = start_server(real_artifact).wait_ready()
    begun = time.monotonic()
    assert server.end(signal.SIGINT) == 0
    assert time.monotonic() - begun < 3


def test_a_key_from_the_environment_and_names(real_artifact: Path, start_server: Any) -> None:
    server = start_server(real_artifact, "--served-model-name", "x/y", XLLM_API_KEY="hush-hush").wait_ready()
    good = openai.OpenAI(base_url=server.url + "/v1", api_key="hush-hush", max_retries=0)
    assert good.models.retrieve("x/y").id == "x/y"
    assert good.completions.create(model="x/y", prompt="a", max_tokens=1).model == "x/y"
    bad = openai.OpenAI(base_url=server.url + "/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        bad.models.list()
    assert server.end() == 0
    log = server.log.read_text()
    assert "POST /v1/completions 200" in log and "hush" not in log and "wrong" not in log


def test_https_and_a_chat_template_of_one_s_own(real_artifact: Path, start_server: Any, tmp_path: Path) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs openssl to make a certificate")
    cert, key, template = tmp_path / "cert.pem", tmp_path / "key.pem", tmp_path / "chat.jinja"
    request = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    subprocess.run([*request, "-keyout", key, "-out", cert], check=True, capture_output=True)
    template.write_text("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}")
    flags = ["--ssl-certfile", str(cert), "--ssl-keyfile", str(key), "--chat-template", str(template)]
    server = start_server(real_artifact, *flags, "--max-num-seqs", "2", "--max-model-len", "64").wait_ready()
    assert server.url.startswith("https://")
    with httpx.Client(base_url=server.url, verify=False) as client:
        body = client.post("/tokenize", json={"messages": [{"role": "user", "content": "x"}]}).json()
        assert body["max_model_len"] == 64
        assert client.post("/detokenize", json={"tokens": body["tokens"]}).json()["prompt"] == "[user]x"
        assert client.post("/v1/completions", json={"prompt": "a", "max_tokens": 64}).status_code == 400
    assert server.end() == 0


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--max-model-len", "999999"], "--max-model-len"),
        (["--max-num-seqs", "999999"], "--max-num-seqs"),
        (["--kv-cache-memory-bytes", "1KiB"], "KV cache"),
        (["--chat-template", "/no/such/file"], "chat template"),
        (["--ssl-certfile", "/no/such", "--ssl-keyfile", "/no/such"], "certificate"),
    ],
)
def test_options_that_cannot_be_met_end_with_2(
    real_artifact: Path, start_server: Any, flags: list[str], word: str
) -> None:
    server = start_server(real_artifact, *flags)
    assert server.popen.wait(30) == 2
    log = server.log.read_text()
    assert word in log and "Traceback" not in log


def test_a_taken_port_is_known_before_anything_slow(real_artifact: Path, real_server: Any) -> None:
    port = real_server.url.rpartition(":")[2]
    command = [Path(sys.executable).parent / "xllm-serve", real_artifact, "--port", port]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 2 and "error[io]" in done.stderr and port in done.stderr


@pytest.mark.parametrize("name", ["weights.bin", "manifest.json", "tokenizer.json"])
def test_one_flipped_bit_ends_the_server_with_2(
    real_artifact: Path, start_server: Any, tmp_path: Path, name: str
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(real_artifact, broken)
    data = bytearray((broken / name).read_bytes())
    data[len(data) // 2] ^= 1
    (broken / name).write_bytes(bytes(data))
    server = start_server(broken)
    assert server.popen.wait(30) == 2
    assert "error[artifact]" in server.log.read_text()


@pytest.mark.slow
def test_a_checkpoint_is_compiled_into_the_cache_first(start_server: Any, tmp_path: Path) -> None:
    bundled = Path(__file__).resolve().parents[2] / "models" / "bundled"
    for _ in range(2):
        server = start_server(bundled, "--cache-dir", str(tmp_path / "cache"), blocked=False).wait_ready(300)
        assert any("compiling it into the cache" in line for line in server.lines)
        answer = httpx.post(server.url + "/v1/completions", json={"prompt": "a", "max_tokens": 1})
        assert answer.status_code == 200
        assert server.end() == 0
