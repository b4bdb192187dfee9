"""What requests hold counts towards one bound, from the beginning to the last byte."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

PATH = "/v1/completions"


def gather(served: Any, count: int, **fields: Any) -> list[httpx.Response]:
    async def go() -> list[httpx.Response]:
        served.ctx.engine_client.attach(asyncio.get_running_loop())
        async with served.client() as client:
            return list(await asyncio.gather(*(client.post(PATH, json=fields) for _ in range(count))))

    return asyncio.run(go())


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "a" * 500},
        {"prompt": "a" * 100, "prompt_logprobs": 20},
        {"prompt": ["a", "b", "c"], "n": 3},
        {"prompt": "a" * 100, "echo": True, "logprobs": 20, "n": 4},
        {"prompt": "a", "stop": ["xyz" * 300] * 3 + ["q" * 1000]},
    ],
    ids=lambda fields: "-".join(fields),
)
def test_requests_that_do_not_fit_are_refused_and_all_is_given_back(make: Any, fields: dict[str, Any]) -> None:
    served = make(max_waiting=200)
    served.executor.delay = 0.01
    statuses = [answer.status_code for answer in gather(served, 12, max_tokens=2, **fields)]
    assert statuses == [200] * 12 and served.ctx.engine_client.held.used == 0
    served.ctx.engine_client.held.limit = 10
    (refused,) = gather(served, 1, max_tokens=2, **fields)
    assert refused.status_code == 400 and refused.json()["error"]["code"] == "capacity"
    served.ctx.engine_client.held.limit = 1_000_000
    answers = gather(served, 40, max_tokens=2, **fields)
    assert {answer.status_code for answer in answers} <= {200, 429, 503} and served.ctx.engine_client.held.used == 0
    assert any(answer.status_code == 200 for answer in answers)


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_that_grows_beyond_the_bound_is_ended_and_others_go_on(make: Any, stream: bool) -> None:
    served = make(max_waiting=200)
    served.ctx.engine_client.held.limit = 1_000_000

    async def go() -> tuple[httpx.Response, httpx.Response]:
        served.ctx.engine_client.attach(asyncio.get_running_loop())
        async with served.client() as client:
            greedy = {"prompt": "a", "n": 4, "max_tokens": 400, "ignore_eos": True, "logprobs": 20, "stream": stream}
            modest = {"prompt": "a", "max_tokens": 20, "ignore_eos": True}
            first = asyncio.create_task(client.post(PATH, json=greedy))
            second = await client.post(PATH, json=modest)
            return await first, second

    first, second = asyncio.run(go())
    assert second.status_code == 200
    if stream:  # what is told at once is not held
        assert first.status_code == 200 and first.text.endswith("data: [DONE]\n\n")
    else:
        assert first.status_code == 503 and "log-probabilities" in first.json()["error"]["message"]
    assert served.ctx.engine_client.held.used == 0 and served.ctx.engine_client.open == 0
    assert gather(served, 1, prompt="a", max_tokens=1)[0].status_code == 200


def test_a_client_that_reads_nothing_is_ended_when_it_holds_too_much(make: Any) -> None:
    served = make(max_waiting=200)
    served.ctx.engine_client.held.limit = 100_000

    async def go() -> str:
        loop = asyncio.get_running_loop()
        served.ctx.engine_client.attach(loop)
        reads = asyncio.Event()
        sent: list[bytes] = []

        async def receive() -> dict[str, Any]:
            if not sent and not asked:
                asked.append(1)
                body = {"prompt": "a", "max_tokens": 400, "ignore_eos": True, "stream": True}
                return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}
            await asyncio.sleep(60)
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message.get("body", b""))
            await reads.wait()

        asked: list[int] = []
        headers = [(b"content-type", b"application/json"), (b"host", b"test")]
        scope = {
            "type": "http",
            "method": "POST",
            "path": PATH,
            "headers": headers,
            "query_string": b"",
            "client": None,
        }
        task = asyncio.create_task(served.app(scope, receive, send))
        for _ in range(500):
            await asyncio.sleep(0.01)
            if sent and served.ctx.engine_client.open == 0:
                break
        reads.set()
        await asyncio.wait_for(task, 10)
        return b"".join(sent).decode()

    text = asyncio.run(go())
    assert "server_overloaded" in text and text.endswith("data: [DONE]\n\n")
    assert served.ctx.engine_client.held.used == 0 and served.ctx.engine_client.open == 0
