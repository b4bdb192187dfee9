"""Ending in order, and saying the truth about health on the way."""

from __future__ import annotations

import concurrent.futures
import json
import time
from typing import Any

import httpx


def test_draining_finishes_what_runs_and_refuses_what_is_new(live: Any, until: Any) -> None:
    live.executor.delay = 0.03
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        ask = {"prompt": "a", "max_tokens": 20, "ignore_eos": True}
        running = pool.submit(httpx.post, live.url + "/v1/completions", json=ask, timeout=20)
        assert until(lambda: live.executor.steps > 2)
        live.server.drain("test")
        for method, path in (("GET", "/health"), ("GET", "/ping"), ("POST", "/v1/completions")):
            body = {"prompt": "a"} if method == "POST" else None
            answer = httpx.request(method, live.url + path, json=body)
            assert answer.status_code == 503 and answer.json()["error"]["code"] == "draining"
            assert int(answer.headers["retry-after"]) >= 1
        answer = running.result()
        assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 20
    assert until(lambda: live.server.ctx.engine_client.open == 0)
    assert until(lambda: not listens(live.url))


def listens(url: str) -> bool:
    try:
        httpx.get(url + "/version")
    except (httpx.ConnectError, httpx.ReadError, httpx.RemoteProtocolError):
        return False  # the last two: what came in while the socket was being closed
    return True


def test_time_s_up_ends_streams_with_an_error_event(make: Any, listen: Any, until: Any) -> None:
    with listen(make(), drain=0.3) as served:
        served.executor.delay = 0.03
        lines: list[str] = []
        ask = {"prompt": "a", "max_tokens": 400, "ignore_eos": True, "stream": True}
        begun = time.monotonic()
        with httpx.stream("POST", served.url + "/v1/completions", json=ask, timeout=20) as answer:
            for line in answer.iter_lines():
                lines += [line] if line else []
                if len(lines) == 2:
                    served.server.drain("test")
        assert time.monotonic() - begun < 5
        assert lines[-1] == "data: [DONE]"
        assert json.loads(lines[-2][6:])["error"]["code"] == "aborted"
        assert until(lambda: served.engine.stats().kv_pages_used == 0)


def test_time_s_up_is_503_for_whole_answers(make: Any, listen: Any, until: Any) -> None:
    with listen(make(), drain=0.2) as served, concurrent.futures.ThreadPoolExecutor(1) as pool:
        served.executor.delay = 0.03
        ask = {"prompt": "a", "max_tokens": 400, "ignore_eos": True}
        running = pool.submit(httpx.post, served.url + "/v1/completions", json=ask, timeout=20)
        assert until(lambda: served.executor.steps > 2)
        served.server.drain("test")
        assert running.result().status_code == 503


def test_health_is_about_tokens_and_not_about_the_port(live: Any, until: Any) -> None:
    assert httpx.get(live.url + "/health").json() == {"status": "ok"}
    live.executor.open.clear()  # the engine is stuck inside a step
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        running = pool.submit(httpx.post, live.url + "/v1/completions", json={"prompt": "a"}, timeout=20)
        assert until(lambda: httpx.get(live.url + "/health").status_code == 503)
        error = httpx.get(live.url + "/health").json()["error"]
        assert error["code"] == "engine_unhealthy" and "no step has finished" in error["message"]
        live.executor.open.set()
        assert running.result().status_code == 200
    assert until(lambda: httpx.get(live.url + "/health").status_code == 200)


def test_health_tells_of_a_dead_engine(fake: Any) -> None:
    fake.engine.stop()
    answer = fake.ask("GET", "/health")
    assert answer.status_code == 503 and "ended" in answer.json()["error"]["message"]
