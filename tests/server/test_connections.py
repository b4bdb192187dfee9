"""A listening server and clients that behave badly: they hang up, say nothing, send too much, or read too slowly."""

from __future__ import annotations

import concurrent.futures
import json
import socket
import time
from typing import Any

import httpx
import pytest

from xllm_compiler.runtime.server.connection_guard import NEW_SECONDS

ENDLESS = {"prompt": "a", "max_tokens": 400, "ignore_eos": True}


def connect(served: Any) -> socket.socket:
    host, port = served.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), 5)


def post_bytes(path: str, body: bytes, *, close: bool = False) -> bytes:
    end = "connection: close\r\n" if close else ""
    head = (
        f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n{end}\r\n"
    )
    return head.encode() + body


def everything(sock: socket.socket) -> bytes:
    sock.settimeout(5)
    parts = []
    while part := sock.recv(65536):
        parts.append(part)
    return b"".join(parts)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_its_pages_within_a_step(live: Any, until: Any, stream: bool) -> None:
    live.executor.delay = 0.02
    sock = connect(live)
    sock.sendall(post_bytes("/v1/completions", json.dumps({**ENDLESS, "n": 2, "stream": stream}).encode()))
    assert until(lambda: live.executor.steps > 3)
    assert live.engine.stats().kv_pages_used > 0
    steps = live.executor.steps
    sock.close()
    assert until(lambda: live.engine.stats().kv_pages_used == 0)
    # One step may have been running, and one more may have begun while the news travelled.
    assert live.executor.steps - steps <= 3
    assert until(lambda: live.ctx.engine_client.open == 0)
    assert live.ctx.metrics.finished["abort"] == 1


def test_hanging_up_in_the_queue_works_too(live: Any, until: Any) -> None:
    live.executor.open.clear()
    socks = [connect(live) for _ in range(12)]  # eight may run
    for sock in socks:
        sock.sendall(post_bytes("/v1/completions", json.dumps(ENDLESS).encode()))
    assert until(lambda: live.ctx.engine_client.open == 12)
    for sock in socks:
        sock.close()
    assert until(lambda: live.ctx.engine_client.open == 0)
    live.executor.open.set()
    assert until(lambda: live.engine.stats().kv_pages_used == 0 and live.engine.stats().waiting == 0)
    assert live.executor.steps <= 2


def test_streams_flow_token_by_token(live: Any) -> None:
    live.executor.delay = 0.02
    times = []
    with httpx.stream("POST", live.url + "/v1/completions", json={**ENDLESS, "max_tokens": 10, "stream": True}) as r:
        for line in r.iter_lines():
            if line:
                times.append(time.monotonic())
    assert len(times) == 11
    assert times[9] - times[0] > 0.1  # nine steps of 20 ms; all at once would be no stream


def test_concurrent_requests_each_get_their_own_answer(live: Any) -> None:
    def ask(number: int) -> bool:
        first = chr(ord("a") + number % 20)
        body = httpx.post(live.url + "/v1/completions", json={"prompt": first, "max_tokens": 3}, timeout=20).json()
        return body["choices"][0]["text"] == "".join(chr(ord(first) + k) for k in (1, 2, 3))

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        assert all(pool.map(ask, range(36)))


def test_a_full_queue_is_429_with_retry_after(make: Any, listen: Any, until: Any) -> None:
    with listen(make(max_waiting=2)) as served:  # eight run, two wait
        served.executor.open.clear()
        socks = [connect(served) for _ in range(10)]
        for sock in socks:
            sock.sendall(post_bytes("/v1/completions", json.dumps({**ENDLESS, "max_tokens": 2}).encode()))
        assert until(lambda: served.ctx.engine_client.open == 10)
        refused = httpx.post(served.url + "/v1/completions", json={"prompt": "a"})
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "server_overloaded"
        served.executor.open.set()
        assert until(lambda: served.ctx.engine_client.open == 0)
        assert httpx.post(served.url + "/v1/completions", json={"prompt": "a"}).status_code == 200
        for sock in socks:
            sock.close()


def test_a_thousand_silent_connections_do_not_stop_service(make: Any, listen: Any, until: Any) -> None:
    with listen(make(receive_timeout=2.0)) as served:
        socks = [connect(served) for _ in range(1000)]
        assert until(lambda: served.guard.open == 1000)
        begun = time.monotonic()
        assert httpx.post(served.url + "/v1/completions", json={"prompt": "a", "max_tokens": 2}).status_code == 200
        assert time.monotonic() - begun < 1.5
        assert until(lambda: served.guard.open == 0, 10)  # all were closed for saying nothing
        assert served.guard.timed_out == 1000
        assert socks[0].recv(10) == b""
        for sock in socks:
            sock.close()


def test_too_many_connections_evict_the_longest_idle(make: Any, listen: Any, until: Any) -> None:
    with listen(make(max_connections=5, receive_timeout=60)) as served:
        socks = [connect(served) for _ in range(5)]
        time.sleep(NEW_SECONDS + 0.1)  # before that, their requests may be on the way
        socks.append(connect(served))
        assert until(lambda: served.guard.evicted >= 1)
        assert httpx.get(served.url + "/health").status_code == 200
        assert socks[0].recv(10) == b""
        for sock in socks:
            sock.close()


@pytest.mark.parametrize("begin", [b"", b"POST /v1/completions HT", b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"])
def test_a_head_that_does_not_arrive_is_given_up(make: Any, listen: Any, begin: bytes) -> None:
    with listen(make(receive_timeout=0.3)) as served:
        sock = connect(served)
        sock.sendall(begin)
        answer = everything(sock)
        assert answer == b"" if not begin else b" 408 " in answer and b"request_timeout" in answer


def test_a_trickling_head_is_given_up_too(make: Any, listen: Any) -> None:
    """Each byte is activity, but the deadline is for the whole head."""
    with listen(make(receive_timeout=0.4)) as served:
        sock = connect(served)
        begun = time.monotonic()
        with pytest.raises(OSError):
            while time.monotonic() - begun < 5:
                sock.sendall(b"G")
                time.sleep(0.05)
        assert time.monotonic() - begun < 3


def test_a_body_that_does_not_arrive_is_given_up(make: Any, listen: Any) -> None:
    with listen(make(receive_timeout=0.3)) as served:
        sock = connect(served)
        sock.sendall(post_bytes("/v1/completions", b"x" * 50)[:-10])
        answer = everything(sock)
        assert answer.startswith(b"HTTP/1.1 408 ") and b"request_timeout" in answer


def test_an_endless_head_is_refused(live: Any) -> None:
    sock = connect(live)
    sock.settimeout(5)
    sent = 0
    try:
        sock.sendall(b"GET / HTTP/1.1\r\n")
        while sent < 64 * 2**20:
            sent += sock.send(b"x: " + b"y" * 10_000 + b"\r\n")
    except OSError:
        pass
    assert sent < 16 * 2**20  # what sits in socket buffers, not what a client cares to send


def test_what_is_not_http_is_refused_in_our_shape(live: Any) -> None:
    sock = connect(live)
    sock.sendall(b"\x16\x03\x01 hello\r\n\r\n")
    answer = everything(sock)
    assert b" 400 " in answer and b'"error"' in answer
    assert httpx.get(live.url + "/health").status_code == 200


def test_a_ten_megabyte_body_gets_an_answer_and_not_a_reset(live: Any) -> None:
    body = b'{"prompt": "' + b"a" * 10_000_000 + b'"}'
    headers = {"content-type": "application/json"}
    answer = httpx.post(live.url + "/v1/completions", content=body, headers=headers)
    assert answer.status_code == 413 and answer.json()["error"]["code"] == "body_too_large"

    sock = connect(live)  # a client that reads nothing before it has sent everything
    sock.sendall(post_bytes("/v1/completions", body))
    assert everything(sock).startswith(b"HTTP/1.1 413 ")

    def chunks() -> Any:
        for start in range(0, len(body), 65536):
            yield body[start : start + 65536]

    answer = httpx.post(live.url + "/v1/completions", content=chunks(), headers=headers)
    assert answer.status_code == 413
    assert httpx.get(live.url + "/health").status_code == 200


def test_expect_100_continue_is_refused_before_the_body_is_sent(live: Any) -> None:
    sock = connect(live)
    sock.sendall(
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        b"content-length: 100000000\r\nexpect: 100-continue\r\n\r\n"
    )
    answer = everything(sock)
    assert answer.startswith(b"HTTP/1.1 413 ")


def test_a_kept_alive_connection_serves_again_and_is_closed_when_idle(make: Any, listen: Any) -> None:
    with listen(make(), keep_alive=1) as served:
        sock = connect(served)
        for _ in range(3):
            sock.sendall(post_bytes("/tokenize", b'{"prompt": "a"}'))
            assert b" 200 OK" in sock.recv(65536)
        begun = time.monotonic()
        assert everything(sock) == b""
        assert 0.5 < time.monotonic() - begun < 4


def test_pipelined_requests_are_answered_in_order(live: Any) -> None:
    sock = connect(live)
    one = post_bytes("/tokenize", b'{"prompt": "a"}')
    two = post_bytes("/tokenize", b'{"prompt": "bb"}', close=True)
    sock.sendall(one + two)
    answer = everything(sock)
    assert answer.index(b'"tokens":[97]') < answer.index(b'"tokens":[98,98]')


def test_a_client_that_never_reads_is_dropped(
    make: Any, listen: Any, until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xllm_compiler.runtime.server.connection_guard.WRITE_STALL_SECONDS", 0.3)
    with listen(make()) as served:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, port = served.url.removeprefix("http://").split(":")
        sock.connect((host, int(port)))
        ask = {"prompt": ["a"] * 24, "max_tokens": 400, "ignore_eos": True, "logprobs": 20, "stream": True}
        sock.sendall(post_bytes("/v1/completions", json.dumps(ask).encode()))
        assert until(lambda: served.ctx.engine_client.open > 0)
        assert until(lambda: served.guard.open == 0, 20)
        assert until(lambda: served.ctx.engine_client.open == 0)
        sock.close()


def test_long_prompts_are_tokenized_beside_running_streams(live: Any) -> None:
    tokens = live.ctx.tokenizer
    slow = {"encoding": lambda self, *a: (time.sleep(0.5), tokens.encoding(*a))[1], "characters_per_token": None}
    live.ctx.tokenizer = type("Slow", (), slow)()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        busy = pool.submit(httpx.post, live.url + "/tokenize", json={"prompt": "a" * 5000})
        time.sleep(0.1)
        begun = time.monotonic()
        assert httpx.get(live.url + "/health").status_code == 200
        assert time.monotonic() - begun < 0.3
        assert busy.result().json()["count"] == 5000
