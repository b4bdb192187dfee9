"""What surrounds a body is bounded, however it is cut: heads, trailers, chunk extensions, requests that wait."""

from __future__ import annotations

import gc
import json
import re
import resource
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from xllm_compiler.runtime.server.connection_guard import MAX_HEAD_BYTES, MAX_HEADERS

CHUNKED = b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
BODY = b'{"prompt": "abc"}'


def connect(served: Any) -> socket.socket:
    host, port = served.url.removeprefix("http://").split(":")
    sock = socket.create_connection((host, int(port)), 5)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def everything(sock: socket.socket) -> bytes:
    """Until the server closes; a reset counts."""
    sock.settimeout(8)
    parts = []
    try:
        while part := sock.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def read_answer(sock: socket.socket) -> bytes:
    """One whole answer with a content-length: head and body may arrive apart."""
    data = b""
    while (end := data.find(b"\r\n\r\n")) < 0 or len(data) < end + 4 + length(data[:end]):
        part = sock.recv(65536)
        if not part:
            break
        data += part
    return data


def length(head: bytes) -> int:
    """What the head of an answer says about its body."""
    found = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
    return int(found[1]) if found else 0


def exchange(served: Any, data: bytes, cut: int = 1 << 30, pause: float = 0.0) -> bytes:
    """Send in pieces of `cut` bytes while reading; everything that comes back."""
    with connect(served) as sock:

        def send() -> None:
            try:
                for at in range(0, len(data), cut):
                    sock.sendall(data[at : at + cut])
                    time.sleep(pause)
            except OSError:
                pass

        sender = threading.Thread(target=send)
        sender.start()
        try:
            return everything(sock)
        finally:
            sock.close()
            sender.join()


def post(path: bytes, body: bytes) -> bytes:
    head = b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    return head % (path, len(body)) + body


def chunk(body: bytes, extension: bytes = b"") -> bytes:
    return b"%x%s\r\n%s\r\n" % (len(body), extension, body)


def head_of(size: int, path: bytes = b"/health") -> bytes:
    """A whole head of exactly `size` bytes, with headers of 1 KB."""
    head = b"GET %s HTTP/1.1\r\nhost: x\r\nconnection: close\r\n" % path
    while len(head) + 1100 < size:
        head += b"x: " + b"y" * 1019 + b"\r\n"
    return head + b"z: " + b"y" * (size - len(head) - 7) + b"\r\n\r\n"


# heads


@pytest.mark.parametrize("cut", [1 << 30, 65536, 60000, 1000, 513])
def test_the_bound_of_a_head_is_exact_however_it_is_cut(live: Any, cut: int) -> None:
    assert len(head_of(MAX_HEAD_BYTES)) == MAX_HEAD_BYTES
    assert exchange(live, head_of(MAX_HEAD_BYTES), cut).startswith(b"HTTP/1.1 200 ")
    for size in (MAX_HEAD_BYTES + 513, 100_000, 255_000, 400_000):  # a piece of the parser's is forgiven
        answer = exchange(live, head_of(size), cut)
        assert answer.startswith(b"HTTP/1.1 431 ") and b"head_too_large" in answer, size
    assert live.guard.refused["head_too_large"] == 4


def test_one_byte_at_a_time(live: Any) -> None:
    assert exchange(live, head_of(400), 1).startswith(b"HTTP/1.1 200 ")
    request = CHUNKED % b"/tokenize" + chunk(BODY[:5], b";a=b") + chunk(BODY[5:]) + b"0\r\na: b\r\n\r\n"
    with connect(live) as sock:
        for byte in request:
            sock.sendall(bytes((byte,)))
        assert b'"tokens":[97,98,99]' in read_answer(sock)


@pytest.mark.parametrize(
    "data",
    [
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET /?" + b"a" * 100_000,
        b"GET / HTTP/1.1\r\nhost: x\r\n" + b"b" * 100_000,
        b"GET / HTTP/1.1\r\nhost: x\r\nb: " + b"c" * 100_000,
        b"GET / HTTP/1.1\r\nhost: x\r\n" + b"a:b\r\n" * 30_000,
        b"\r\n" * 100_000,
    ],
    ids=["line", "query", "name", "value", "headers", "empty-lines"],
)
def test_no_part_of_a_head_grows(live: Any, data: bytes) -> None:
    answer = exchange(live, data)
    assert answer.startswith(b"HTTP/1.1 431 ") and b'"error"' in answer


def test_how_many_headers(live: Any) -> None:
    head = b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
    assert exchange(live, head + b"a:b\r\n" * (MAX_HEADERS - 2) + b"\r\n").startswith(b"HTTP/1.1 200 ")
    assert exchange(live, head + b"a:b\r\n" * (MAX_HEADERS - 1) + b"\r\n").startswith(b"HTTP/1.1 431 ")


# what comes beside a body


def trailers() -> Iterator[bytes]:
    yield b"0\r\n"
    while True:
        yield b"a:b\r\n" * 13_000


def one_trailer() -> Iterator[bytes]:
    yield b"0\r\na: "
    while True:
        yield b"b" * 60_000


def one_extension() -> Iterator[bytes]:
    yield b"5;a="
    while True:
        yield b"b" * 60_000


def many_extensions() -> Iterator[bytes]:
    while True:
        yield chunk(b" ", b";" + b"e" * 1000) * 60


def tiny_chunks() -> Iterator[bytes]:
    while True:
        yield chunk(b" ") * 10_000


def long_sizes() -> Iterator[bytes]:
    while True:
        yield b"0" * 60_000


@pytest.mark.parametrize(
    "stream",
    [trailers, one_trailer, one_extension, many_extensions, tiny_chunks, long_sizes],
    ids=lambda stream: stream.__name__,
)
@pytest.mark.parametrize("path", [b"/health", b"/v1/completions", b"/v1/models"])
@pytest.mark.parametrize("keys", [(), ("k",)], ids=["open", "locked"])
def test_what_comes_beside_a_body_is_bounded(make: Any, listen: Any, stream: Any, path: bytes, keys: Any) -> None:
    """The client sends for ever; the server must stop it by itself, long before any timeout."""
    with listen(make(keys=keys, receive_timeout=60, max_body_size=64 * 2**20)) as served, connect(served) as sock:
        begun = time.monotonic()
        sent = 0
        sock.sendall((CHUNKED % path).replace(b"POST /health", b"GET /health").replace(b"POST /v1/m", b"GET /v1/m"))
        with pytest.raises(OSError):
            for data in stream():
                sock.sendall(data)
                sent += len(data)
                if sent > 64 * 2**20:
                    break
        assert sent < 16 * 2**20 and time.monotonic() - begun < 10
        assert httpx.get(served.url + "/health").status_code == 200


def test_trailers_are_not_kept(live: Any) -> None:
    """Allowed ones neither reach the application nor the next request on the connection."""
    few = b"".join(b"t%d: %s\r\n" % (i, b"x" * 100) for i in range(100))
    with connect(live) as sock:
        for _ in range(3):
            sock.sendall(CHUNKED % b"/tokenize" + chunk(BODY) + b"0\r\n" + few + b"\r\n")
            assert b'"tokens":[97,98,99]' in read_answer(sock)


def test_memory_under_endless_trailers(live: Any) -> None:
    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    gc.collect()
    before = resident()
    socks = [connect(live) for _ in range(20)]
    for sock in socks:
        sock.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n0\r\n")
        sock.settimeout(2)
        try:
            for _ in range(100):
                sock.sendall(b"a:b\r\n" * 13_000)
        except OSError:
            pass
    assert resident() - before < 32 * 2**20
    for sock in socks:
        sock.close()


@pytest.mark.parametrize("size", [1, 2, 7, 100, 5000])
def test_chunks_of_any_size_are_taken(live: Any, size: int) -> None:
    body = json.dumps({"prompt": "a", "logit_bias": {str(i % 250): 1 for i in range(400)}}).encode()
    request = CHUNKED % b"/v1/completions" + b"".join(chunk(body[at : at + size]) for at in range(0, len(body), size))
    with connect(live) as sock:
        sock.sendall(request + b"0\r\n\r\n")
        assert b" 200 OK" in read_answer(sock)


def test_a_large_body_in_small_chunks_is_taken(make: Any, listen: Any) -> None:
    body = b'{"prompt": "abc"' + b" " * 2**20 + b"}"
    with listen(make()) as served, connect(served) as sock:
        for at in range(0, len(body), 64):
            sock.sendall(chunk(body[at : at + 64]) if at else CHUNKED % b"/tokenize" + chunk(body[:64]))
        sock.sendall(b"0\r\n\r\n")
        assert b'"tokens":[97,98,99]' in read_answer(sock)


@pytest.mark.parametrize(
    "coding", [b"gzip, chunked", b"chunked, chunked", b"identity, chunked", b"deflate", b"chunked;q=1", b"x"]
)
def test_encodings_that_we_do_not_decode_are_refused(live: Any, coding: bytes) -> None:
    head = (CHUNKED % b"/tokenize").replace(b": chunked", b": " + coding)
    answer = exchange(live, head + chunk(BODY) + b"0\r\n\r\n")
    assert answer.startswith((b"HTTP/1.1 501 ", b"HTTP/1.1 400 ")) and b'"error"' in answer and b"tokens" not in answer
    split = (CHUNKED % b"/tokenize").replace(b"transfer", b"transfer-encoding: gzip\r\ntransfer")
    assert exchange(live, split + chunk(BODY) + b"0\r\n\r\n").startswith(b"HTTP/1.1 501 ")


@pytest.mark.parametrize(
    "head",
    [
        b"content-length: 17\r\ntransfer-encoding: chunked\r\n",
        b"content-length: 17\r\ncontent-length: 18\r\n",
        b"content-length: +17\r\n",
        b"content-length: 99999999999999999999999\r\n",
        b"content-length : 17\r\n",
        b"content-length: 17\n",
    ],
)
def test_ambiguous_lengths_are_refused(live: Any, head: bytes) -> None:
    start = b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    answer = exchange(live, start + head + b"\r\n" + BODY)
    assert answer.startswith(b"HTTP/1.1 400 ") and b"tokens" not in answer


# after an answer, and behind a request


def test_a_body_that_nobody_wants_ends(make: Any, listen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused request's body may still arrive, but not for ever."""
    monkeypatch.setattr("xllm_compiler.runtime.server.connection_guard._MOST_DISCARDED", 2**20)
    with listen(make(keys=("k",))) as served, connect(served) as sock:
        sock.sendall(b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-length: 100000000000\r\n\r\n")
        assert read_answer(sock).startswith(b"HTTP/1.1 401 ")
        sent = 0
        with pytest.raises(OSError):
            while sent < 64 * 2**20:
                sent += sock.send(b"x" * 65536)
        assert sent < 16 * 2**20


def test_a_refused_body_leaves_the_connection_usable(make: Any, listen: Any) -> None:
    with listen(make(keys=("k",))) as served, connect(served) as sock:
        for _ in range(3):
            sock.sendall(b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-length: 200000\r\n\r\n" + b"x" * 200_000)
            assert read_answer(sock).startswith(b"HTTP/1.1 401 ")


@pytest.mark.parametrize("many", [2, 30, 5000])
def test_pipelined_requests_are_all_answered(live: Any, many: int) -> None:
    one = b"GET /v1/nothing HTTP/1.1\r\nhost: x\r\n\r\n"
    answer = exchange(live, one * many + one.replace(b"host", b"connection: close\r\nhost"))
    assert answer.count(b"HTTP/1.1 404 ") == many + 1


def test_pipelined_bodies_stay_apart(live: Any) -> None:
    def ask(prompt: str, chunked: bool) -> bytes:
        body = json.dumps({"prompt": prompt}).encode()
        if chunked:
            return CHUNKED % b"/tokenize" + chunk(body[:3], b";x") + chunk(body[3:]) + b"0\r\na: b\r\n\r\n"
        return post(b"/tokenize", body)

    many = [chr(ord("a") + i % 26) * (i % 7 + 1 if i % 5 else 900) for i in range(60)]
    data = b"".join(ask(text, i % 3 == 0) for i, text in enumerate(many))
    answer = exchange(live, data + b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n", 777)
    for text in many:
        _, _, answer = answer.partition(b'"tokens":')
        assert answer.startswith(json.dumps([ord(c) for c in text]).replace(" ", "").encode())
    assert b'"status":"ok"' in answer


def test_what_waits_behind_a_request_is_bounded(make: Any, listen: Any, until: Any) -> None:
    with listen(make()) as served, connect(served) as sock:
        served.executor.open.clear()
        body = json.dumps({"prompt": "a", "max_tokens": 3}).encode()
        sock.sendall(post(b"/v1/completions", body))
        assert until(lambda: served.ctx.engine_client.open == 1)
        sock.settimeout(0.5)
        sent = 0
        with pytest.raises(TimeoutError):
            while sent < 64 * 2**20:
                sent += sock.send(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n" * 1000)
        assert served.ctx.budget.peak < 2**20
        served.executor.open.set()
        sock.settimeout(5)
        assert read_answer(sock).startswith(b"HTTP/1.1 200 ")


def test_a_bad_request_behind_a_good_one_waits_for_its_answer(live: Any, until: Any) -> None:
    for bad in (b"\x16\x03\x01 garbage\r\n\r\n", head_of(100_000), b"GET / HTTP/1.1\r\nhost x\r\n\r\n"):
        live.executor.open.clear()
        body = json.dumps({"prompt": "a", "max_tokens": 3}).encode()
        with connect(live) as sock:
            sock.sendall(post(b"/v1/completions", body) + bad)
            assert until(lambda: live.ctx.engine_client.open == 1)
            live.executor.open.set()
            answer = everything(sock)
        first, second = answer.index(b"HTTP/1.1 200 "), answer.index(b"HTTP/1.1 4")
        assert first < answer.index(b'"text":"bcd"') < second and answer.count(b"HTTP/1.1") == 2


def test_a_client_that_asks_to_upgrade_is_served_without(live: Any) -> None:
    """Java's own HTTP client asks for h2c with every request."""
    head = (
        b"POST /tokenize HTTP/1.1\r\nhost: x\r\nconnection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\n"
        b"http2-settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA\r\ncontent-type: application/json\r\n"
    )
    data = head + b"content-length: %d\r\n\r\n%s" % (len(BODY), BODY)
    for cut in (1 << 30, 40):
        with connect(live) as sock:
            for _ in range(2):
                for at in range(0, len(data), cut):
                    sock.sendall(data[at : at + cut])
                    time.sleep(0.001)
                assert b'"tokens":[97,98,99]' in read_answer(sock)
    assert exchange(live, head + b"transfer-encoding: chunked\r\n\r\n").startswith(b"HTTP/1.1 400 ")


# all connections together


def test_bodies_in_flight_share_a_budget(make: Any, listen: Any, until: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow senders of large bodies make room for each other and for quick ones; nobody takes more than there is."""
    monkeypatch.setattr("xllm_compiler.runtime.server.middleware._SWALLOW_SECONDS", 0.5)
    with listen(make(budget_bytes=2**20, receive_timeout=20)) as served:
        head = b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 400000\r\n\r\n"
        socks = [connect(served) for _ in range(40)]
        for sock in socks:
            sock.sendall(head + b" " * 100_000)
        budget = served.ctx.budget
        assert until(lambda: budget.given_up == 30)
        assert budget.used <= budget.peak <= 2**20
        large = b'{"prompt": "a"' + b" " * 300_000 + b"}"
        answer = httpx.post(served.url + "/tokenize", content=large, headers={"content-type": "application/json"})
        assert answer.status_code == 200
        answer = everything(socks[0])  # the first one had been at it longest
        assert answer.startswith(b"HTTP/1.1 503 ") and b"retry-after: " in answer and b"too_many_bytes" in answer
        for sock in socks:
            sock.close()
        assert until(lambda: budget.used == 0)


def test_heads_in_flight_share_it_too(make: Any, listen: Any, until: Any) -> None:
    with listen(make(budget_bytes=2**20)) as served:
        socks = [connect(served) for _ in range(40)]
        for sock in socks:
            sock.sendall(head_of(60_000)[:50_000])
        assert until(lambda: served.ctx.budget.given_up >= 19)
        assert served.ctx.budget.peak <= 2**20
        assert b" 503 " in everything(socks[0])
        assert httpx.get(served.url + "/health").status_code == 200
        for sock in socks:
            sock.close()
        assert until(lambda: served.ctx.budget.used == 0)


def test_the_budget_is_free_again_after_every_kind_of_end(make: Any, listen: Any, until: Any) -> None:
    with listen(make(receive_timeout=0.5, max_body_size=10_000)) as served:
        url = served.url + "/tokenize"
        assert httpx.post(url, json={"prompt": "a"}).status_code == 200
        assert httpx.post(url, json={"prompt": "a" * 20_000}).status_code == 413
        assert httpx.post(url, content=b"{", headers={"content-type": "application/json"}).status_code == 400
        with connect(served) as sock:  # hangs up
            sock.sendall(CHUNKED % b"/tokenize" + chunk(b" " * 500))
            assert until(lambda: served.ctx.budget.used > 0)
        with connect(served) as sock:  # times out
            sock.sendall(CHUNKED % b"/tokenize" + chunk(b" " * 500))
            assert b" 408 " in everything(sock)
        assert until(lambda: served.ctx.budget.used == 0)
        assert served.ctx.budget.peak < 30_000


def test_nothing_of_a_body_is_read_before_the_key(make: Any, listen: Any) -> None:
    with listen(make(keys=("k",))) as served, connect(served) as sock:
        sock.sendall(CHUNKED % b"/tokenize" + chunk(b" " * 50_000))
        assert read_answer(sock).startswith(b"HTTP/1.1 401 ")
        assert served.ctx.budget.peak == 0


def test_connections_beyond_the_limit_are_told(make: Any, listen: Any, until: Any) -> None:
    with listen(make(max_connections=5)) as served:
        served.executor.open.clear()
        body = json.dumps({"prompt": "a", "max_tokens": 1}).encode()
        ask = post(b"/v1/completions", body)
        busy = [connect(served) for _ in range(5)]
        for sock in busy:
            sock.sendall(ask)
        assert until(lambda: served.ctx.engine_client.open == 5)
        more = [connect(served) for _ in range(12)]
        for sock in more:
            sock.sendall(ask)
        answers = [everything(sock) for sock in more]
        assert all(b" 503 " in answer and b"retry-after" in answer for answer in answers)
        assert served.guard.refused["too_many_connections"] == 12
        served.executor.open.set()
        assert all(read_answer(sock).startswith(b"HTTP/1.1 200 ") for sock in busy)
        for sock in [*busy, *more]:
            sock.close()
