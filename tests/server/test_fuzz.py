"""Bad values in every field of every endpoint: a typed refusal or an answer, no fault of ours, and nothing stuck."""

from __future__ import annotations

import asyncio
import json
import random
import time
from typing import Any

import httpx
import msgspec

from xllm_compiler.runtime.server import protocol

FIELDS = {
    "/v1/completions": (protocol.CompletionRequest, {"prompt": "abc", "max_tokens": 2}),
    "/v1/chat/completions": (
        protocol.ChatRequest,
        {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
    ),
    "/tokenize": (protocol.TokenizeRequest, {"prompt": "abc"}),
    "/detokenize": (protocol.DetokenizeRequest, {"tokens": [97]}),
}
LITERALS = [
    b"null",
    b"true",
    b"false",
    b"0",
    b"-0",
    b"-1",
    b"1",
    b"2",
    b"3.5",
    b"1e308",
    b"1e999",
    b"-1e-999",
    b"1E+2",
    b"0.0",
    b"2147483648",
    b"4294967296",
    b"9223372036854775808",
    b"18446744073709551616",
    b"-9223372036854775809",
    b"1" * 500,
    b'""',
    b'"a"',
    b'"\\u0000"',
    b'"\\ud800"',
    b'"\xff"',
    b'"\xed\xa0\x80"',
    b'"NaN"',
    b'"1"',
    b'"' + b"x" * 5000 + b'"',
    b'"\xf0\x9f\x98\x80"',
    b'"\\n\\r"',
    b'"{{ 7 * 7 }}"',
    b'"../../etc/passwd"',
    b"NaN",
    b"Infinity",
    b"-Infinity",
    b"01",
    b"+1",
    b".5",
    b"'a'",
    b"undefined",
    b"[]",
    b"{}",
    b"[[]]",
    b"[{}]",
    b"[null]",
    b"[1,2]",
    b"[1,[2]]",
    b"[[1],[2]]",
    b'["a","b"]',
    b'["a",1]',
    b"[-1]",
    b"[260]",
    b"[99999999999999999999]",
    b"[1.5]",
    b"[true]",
    b"[1," * 300 + b"1" + b"]" * 300,
    b"[" * 5000,
    b"[" * 5000 + b"]" * 5000,
    b'{"a":' * 2000 + b"1" + b"}" * 2000,
    b'{"":""}',
    b'{"5":1}',
    b'{"5":"x"}',
    b'{"-5":1}',
    b'{"x":1}',
    b'{"5":1e5}',
    b'{"999999999999":1}',
    b'{"self":1}',
    b'{"__class__":{"__mro__":1}}',
    b'{"include_usage":1}',
    b'{"include_usage":true}',
    b'[{"role":"user"}]',
    b'[{"role":1,"content":"x"}]',
    b'[{"role":"user","content":[{"type":"text"}]}]',
    b'[{"role":"user","content":[{"type":"image_url"}]}]',
    b'[{"role":"user","content":{"type":"text","text":"x"}}]',
    b'[{"role":"","content":"x"}]',
    b'[{"role":"user","content":null}]',
    b'[{"role":"assistant","content":null}]',
    b'[{"role":"user","content":"x","tool_calls":[1]}]',
    b'[{"content":"x"}]',
    b'[{"role":"user","content":"x","name":{"a":[[[[]]]]}}]',
    b'[{"role":"user","content":"x","annotations":' + b"[" * 2000 + b"]" * 2000 + b"}]",
    b"[" + b"1," * 3000 + b"1]",
    b"[" + b'"a",' * 3000 + b'"a"]',
    b"{" + b'"k":1,' * 3000 + b'"z":1}',
    b"1]",
    b"}",
    b"",
    b" ",
    b'"a',
    b"[1",
    b"\x00",
]
NAMES = ["self", "__init__", "Prompt", "prompt ", "", "max_token", "x" * 3000, "\u0000", "\U0001f600", "a.b", "$"]
COUNT = 1500


def bodies(seed: int) -> list[tuple[str, bytes]]:
    """Every field with many values, alone and in pairs, and fields that nobody knows."""
    source = random.Random(seed)
    out: list[tuple[str, bytes]] = []
    while len(out) < COUNT:
        path, (kind, good) = source.choice(list(FIELDS.items()))
        names = [field.name for field in msgspec.structs.fields(kind)]
        fields = {name.encode(): json.dumps(value).encode() for name, value in good.items()}
        for _ in range(source.choice((1, 1, 1, 2, 3))):
            pool = source.choice((names, names, names, [*protocol.OFF, *protocol.HARMLESS], NAMES))
            fields[json.dumps(source.choice(pool))[1:-1].encode()] = source.choice(LITERALS)
        body = b"{" + b",".join(b'"' + name + b'":' + value for name, value in fields.items()) + b"}"
        out.append((path, body[: source.randrange(len(body))] if source.random() < 0.03 else body))
    return out


def test_bad_values_get_typed_answers(make: Any) -> None:
    served = make(max_waiting=2000, pages=256)
    slowest = 0.0
    faults: list[str] = []

    async def one(client: httpx.AsyncClient, path: str, body: bytes) -> int:
        nonlocal slowest
        began = time.monotonic()
        answer = await asyncio.wait_for(
            client.post(path, content=body, headers={"content-type": "application/json"}), timeout=10
        )
        slowest = max(slowest, time.monotonic() - began)
        text = answer.text
        if answer.status_code == 200:
            good = "data: [DONE]" in text if "event-stream" in answer.headers["content-type"] else bool(answer.json())
        else:
            error = answer.json()["error"]
            good = 400 <= answer.status_code < 500 and bool(error["message"]) and len(text) < 2000
            good = good and set(error) == {"message", "type", "param", "code"}
        if not good:
            faults.append(f"{path} {body[:300]!r}: {answer.status_code} {text[:300]}")
        return answer.status_code

    async def go() -> list[int]:
        served.ctx.engine_client.attach(asyncio.get_running_loop())
        statuses: list[int] = []
        async with served.client() as client:
            todo = bodies(seed=1)
            for start in range(0, len(todo), 25):
                statuses += await asyncio.gather(*(one(client, *item) for item in todo[start : start + 25]))
            assert (await client.get("/health")).status_code == 200
        return statuses

    statuses = asyncio.run(go())
    assert not faults, "\n".join(faults[:10])
    assert len(statuses) == COUNT and statuses.count(400) > COUNT / 2 and statuses.count(200) > COUNT / 40
    assert slowest < 10 and served.ctx.engine_client.open == 0 and served.ctx.engine_client.held.used == 0
    assert served.post("/v1/completions", prompt="a", max_tokens=1).json()["choices"][0]["text"] == "b"
