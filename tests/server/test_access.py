"""Which hosts the server goes by, which web pages may call it, and what a browser is told."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from xllm_compiler.runtime.server.access import Cors, Hosts, host_name, hosts_for

LOOPBACK = hosts_for("127.0.0.1", (), keys=False)
ASK = {"prompt": "a", "max_tokens": 1}
EVIL = "https://evil.example"


def raw(served: Any, request: bytes) -> bytes:
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 5) as sock:
        sock.sendall(request)
        parts = []
        while part := sock.recv(65536):
            parts.append(part)
        return b"".join(parts)


@pytest.fixture
def strict(make: Any, listen: Any) -> Iterator[Any]:
    """As `xllm-serve` starts by default."""
    with listen(make(hosts=LOOPBACK)) as served:
        yield served


# hosts

OURS = [
    "localhost",
    "localhost:8000",
    "LOCALHOST",
    "localhost.",
    "localhost.:80",
    "chat.localhost:3000",
    "127.0.0.1",
    "127.0.0.1:1",
    "127.8.9.10",
    "127.0.0.1.",
    "0.0.0.0:8000",
    "192.168.1.7:8000",
    "[::1]",
    "[::1]:8000",
    "[FE80::1]:8000",
    "[::ffff:127.0.0.1]",
    socket.gethostname(),
]
NOT_OURS = [
    "evil",
    "evil.example",
    "evil.example:8000",
    "localhost.evil.example",
    "127.0.0.1.evil.example",
    "notlocalhost",
    "127.1",
    "xn--e1afmkfd.example",
    "printer.local",
]
NO_HOST = ["", ":80", "a b", "a@b", "http://localhost", "localhost/x", "[::1", "::1", "[localhost]", "a,b", "a:b", "."]


@pytest.mark.parametrize("host", OURS)
def test_our_hosts(strict: Any, host: str) -> None:
    answer = raw(strict, f"GET /v1/models HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("host", NOT_OURS)
@pytest.mark.parametrize("path", ["/v1/models", "/health", "/metrics"])
def test_a_name_that_is_not_ours_is_refused_everywhere(strict: Any, host: str, path: str) -> None:
    answer = raw(strict, f"GET {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 403 ") and b"host_not_allowed" in answer and b"--allowed-hosts" in answer


@pytest.mark.parametrize("host", NO_HOST)
def test_what_is_no_host_is_400(strict: Any, host: str) -> None:
    answer = raw(strict, f"GET /health HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 400 ") and b'"error"' in answer


def test_no_host_and_two_hosts(strict: Any) -> None:
    assert raw(strict, b"GET /health HTTP/1.1\r\nconnection: close\r\n\r\n").startswith(b"HTTP/1.1 400 ")
    for other in (b"localhost", b"evil.example"):
        two = b"GET /health HTTP/1.1\r\nhost: localhost\r\nHost: %s\r\nconnection: close\r\n\r\n" % other
        assert raw(strict, two).startswith(b"HTTP/1.1 400 ")
    assert b" 200 OK" in raw(
        strict, b"GET /health HTTP/1.0\r\n\r\n"
    )  # probes of HTTP/1.0 name none, browsers always do
    assert b" 403 " in raw(strict, b"GET /health HTTP/1.0\r\nhost: evil.example\r\n\r\n")


@pytest.mark.parametrize(
    ("target", "host", "status"),
    [
        ("http://localhost:8000/health", "evil.example", 200),  # RFC 9112, 3.2.2: the target wins
        ("http://evil.example/health", "localhost", 403),
        ("HTTP://EVIL.example:80/health?x", "localhost", 403),
        ("http://user@evil.example/health", "localhost", 403),
        ("http://[::1]:9/health", "evil.example", 200),
        ("http://localhost", "localhost", 404),
        ("ftp://localhost/health", "localhost", 400),
        ("localhost:80", "localhost", 400),
        ("health", "localhost", 400),
        ("*", "localhost", 400),
    ],
)
def test_targets_with_a_host(strict: Any, target: str, host: str, status: int) -> None:
    answer = raw(strict, f"GET {target} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 %d " % status)


@pytest.mark.parametrize("host", NO_HOST)
def test_no_host_names(host: str) -> None:
    with pytest.raises(ValueError):
        host_name(host)


def test_what_is_listed_passes() -> None:
    hosts = hosts_for("127.0.0.1", ("api.example.com", "*.Example.org."), keys=False)
    for name in ("api.example.com", "a.example.org", "a.b.example.org", "localhost", "10.0.0.1"):
        assert hosts.allows(name)
    for name in ("example.com", "x.api.example.com", "example.org", "badexample.org", "evil"):
        assert not hosts.allows(name)
    assert hosts_for("127.0.0.1", ("*",), keys=False).allows("evil")


def test_where_it_listens_decides() -> None:
    for bound in ("127.0.0.1", "127.0.0.2", "::1", "localhost"):
        for keys in (False, True):
            hosts = hosts_for(bound, (), keys=keys)
            assert hosts.allows("localhost") and not hosts.allows("gpu-box") and not hosts.allows("a.example")
    for bound in ("0.0.0.0", "::", "192.168.0.7"):
        open_to_all = hosts_for(bound, (), keys=False)
        for name in ("xllm", "xllm.default.svc.cluster.local", "metadata.internal", "10.1.2.3"):  # compose, clusters
            assert open_to_all.allows(name)
        assert not open_to_all.allows("evil.example")
        assert hosts_for(bound, (), keys=True).allows("api.example.com")  # behind a proxy
        listed = hosts_for(bound, ("api.example.com",), keys=True)
        assert listed.allows("api.example.com") and not listed.allows("evil.example")
    assert hosts_for("Box.Example.com", (), keys=False).allows("box.example.com")


# pages

MINE = [
    "http://localhost:5173",
    "http://127.0.0.1:3000",
    "https://localhost",
    "http://[::1]:8080",
    "http://a.localhost",
]
OTHERS = [
    EVIL,
    "null",
    "http://localhost.evil.example",
    "http://evil.example/localhost",
    "http://127.0.0.1.evil.example",
]


@pytest.mark.parametrize("origin", MINE)
def test_pages_of_this_machine_may_call(strict: Any, origin: str) -> None:
    asks = {
        "origin": origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,x-stainless-lang",
        "access-control-request-private-network": "true",
    }
    answer = httpx.options(strict.url + "/v1/chat/completions", headers=asks)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == origin
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert "authorization" in answer.headers["access-control-allow-headers"]
    assert answer.headers["access-control-allow-private-network"] == "true"
    answer = httpx.post(strict.url + "/v1/completions", json=ASK, headers={"origin": origin})
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == origin and "origin" in answer.headers["vary"].lower()
    assert {"x-request-id", "retry-after"} <= set(answer.headers["access-control-expose-headers"].split(", "))


@pytest.mark.parametrize("origin", OTHERS)
def test_pages_of_others_may_not(strict: Any, origin: str) -> None:
    asks = {"origin": origin, "access-control-request-method": "POST"}
    answer = httpx.options(strict.url + "/v1/completions", headers=asks)
    assert answer.status_code == 400 and "access-control-allow-origin" not in answer.headers
    for path, body in (("/v1/completions", ASK), ("/tokenize", {"prompt": "a"}), ("/ping", None)):
        answer = httpx.post(strict.url + path, json=body, headers={"origin": origin})
        assert answer.status_code == 403 and answer.json()["error"]["code"] == "origin_not_allowed"
        assert "access-control-allow-origin" not in answer.headers
    answer = httpx.get(strict.url + "/v1/models", headers={"origin": origin})
    assert answer.status_code == 200 and "access-control-allow-origin" not in answer.headers  # the page cannot read it
    assert strict.executor.steps == 0


def test_a_page_that_came_from_here_may_call(make: Any, listen: Any) -> None:
    """A proxy may serve a user interface under the name that it passes on."""
    with listen(make(hosts=Hosts(("chat.example.com",)))) as served:
        for origin, status in (("https://chat.example.com", 200), ("https://evil.example", 403)):
            headers = {"host": "chat.example.com", "origin": origin}
            assert httpx.post(served.url + "/v1/completions", json=ASK, headers=headers).status_code == status


@pytest.mark.parametrize(
    ("origins", "good", "bad"),
    [
        (("https://a.example",), ["https://a.example"], ["http://a.example", "https://a.example:444", MINE[0]]),
        (("https://*.a.example",), ["https://x.a.example", "https://x.y.a.example"], ["https://a.example", EVIL]),
        (
            ("http://localhost:*", "app://obsidian.md"),
            ["http://localhost:9", "app://obsidian.md"],
            ["http://127.0.0.1"],
        ),
        (("*",), [*OTHERS, "https://any.example"], []),
        ((), [], [*MINE, EVIL]),
        (("null",), ["null"], [EVIL]),
        (("https://a.b",), ["https://a.b"], ["https://axb"]),
    ],
)
def test_listed_origins(make: Any, listen: Any, origins: Any, good: list[str], bad: list[str]) -> None:
    with listen(make(hosts=LOOPBACK, cors=Cors(origins))) as served:
        for origin in good:
            answer = httpx.post(served.url + "/v1/completions", json=ASK, headers={"origin": origin})
            assert answer.status_code == 200
            assert answer.headers["access-control-allow-origin"] == ("*" if origins == ("*",) else origin)
        for origin in bad:
            answer = httpx.post(served.url + "/v1/completions", json=ASK, headers={"origin": origin})
            assert answer.status_code == 403, origin


def test_errors_can_be_read_by_a_page(make: Any, listen: Any) -> None:
    """Otherwise a browser tells the page of a network error, whatever it was."""
    with listen(make(keys=("k",), max_body_size=1000)) as served:
        page = {"origin": MINE[0]}
        key = {**page, "authorization": "Bearer k"}
        big = {"prompt": "a" * 2000}
        assert httpx.options(
            served.url + "/v1/models", headers={**page, "access-control-request-method": "GET"}
        ).is_success  # a preflight carries no key
        answers = [
            httpx.get(served.url + "/v1/models", headers=page),
            httpx.get(served.url + "/v1/nothing", headers=key),
            httpx.delete(served.url + "/v1/models", headers=key),
            httpx.post(served.url + "/v1/completions", json=big, headers=key),
            httpx.post(served.url + "/v1/completions", content=b"{}", headers=key),
            httpx.post(served.url + "/v1/completions", json={}, headers=key),
        ]
        served.executor.fail = True
        answers.append(httpx.post(served.url + "/v1/completions", json=ASK, headers=key))
        assert [answer.status_code for answer in answers] == [401, 404, 405, 413, 415, 400, 500]
        for answer in answers:
            assert answer.headers["access-control-allow-origin"] == MINE[0] and answer.json()["error"]


def test_a_key_is_enough_wherever_a_page_is_from(make: Any, listen: Any) -> None:
    with listen(make(keys=("k",))) as served:
        headers = {"origin": EVIL, "authorization": "Bearer k"}
        answer = httpx.post(served.url + "/v1/completions", json=ASK, headers=headers)
        assert answer.status_code == 200 and "access-control-allow-origin" not in answer.headers


def test_streams_flow_to_pages(strict: Any) -> None:
    strict.executor.delay = 0.01
    with httpx.stream(
        "POST",
        strict.url + "/v1/completions",
        json={"prompt": "a", "max_tokens": 5, "stream": True},
        headers={"origin": MINE[0]},
    ) as answer:
        assert answer.headers["access-control-allow-origin"] == MINE[0]
        lines = [line for line in answer.iter_lines() if line]
    assert len(lines) == 6 and lines[-1] == "data: [DONE]"


def test_methods_headers_and_credentials(make: Any, listen: Any) -> None:
    cors = Cors(("https://a.example",), ("POST",), ("x-a",), credentials=True)
    with listen(make(cors=cors)) as served:

        def ask(method: str, header: str) -> httpx.Response:
            headers = {
                "origin": "https://a.example",
                "access-control-request-method": method,
                "access-control-request-headers": header,
            }
            return httpx.options(served.url + "/v1/completions", headers=headers)

        answer = ask("POST", "x-a")
        assert answer.status_code == 200 and answer.headers["access-control-allow-credentials"] == "true"
        assert ask("DELETE", "x-a").status_code == ask("POST", "x-b").status_code == 400


def test_options_without_a_preflight_is_no_method_of_ours(strict: Any) -> None:
    assert httpx.options(strict.url + "/v1/completions").status_code == 405
