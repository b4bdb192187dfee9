"""What one request may cost is known from its size: refused before it is paid, whatever the list."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from xllm_compiler.runtime.chat_template import ChatTemplate
from xllm_compiler.runtime.server import context

PATH = "/v1/completions"
CHAT = "/v1/chat/completions"
USER = {"role": "user", "content": "x"}
PART = {"type": "text", "text": "a"}
KEYS = {f"u{i}": 1 for i in range(300_000)}
LISTS: list[Any] = [[]] * 1_000_000


@contextlib.contextmanager
def longest_turn() -> Iterator[list[float]]:
    """The processor time, in seconds, of the longest that the event loop did without letting others have their turn."""
    gc.collect()
    gc.freeze()  # as the server does: what the tests before left would be looked at in somebody's turn
    longest, run = [0.0], asyncio.events.Handle._run

    def timed(handle: asyncio.events.Handle) -> None:
        began = time.thread_time()
        run(handle)
        longest[0] = max(longest[0], time.thread_time() - began)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio.events.Handle, "_run", timed)
        yield longest


def ask(served: Any, path: str, body: bytes) -> tuple[Any, float]:
    """The answer, and the longest turn that it took."""
    with longest_turn() as longest:
        answer = served.ask("POST", path, content=body, headers={"content-type": "application/json"})
    return answer, longest[0]


def packed(**fields: Any) -> bytes:
    return json.dumps(fields, separators=(",", ":")).encode()


MANY: list[tuple[str, str, str, Callable[[], bytes]]] = [
    ("texts", PATH, "prompt", lambda: packed(prompt=["a"] * 800_000)),
    ("texts with quotes", PATH, "prompt", lambda: packed(prompt=['\\"\\'] * 400_000)),
    ("texts of backslashes", PATH, "prompt", lambda: packed(prompt=["\\"] * 600_000)),
    ("lists of ids", PATH, "prompt", lambda: packed(prompt=[[1]] * 900_000)),
    ("lists of texts", PATH, "prompt", lambda: packed(prompt=[["a"]] * 500_000)),
    ("ids", PATH, "prompt", lambda: packed(prompt=[1] * 2_000_000)),
    ("messages", CHAT, "messages", lambda: packed(messages=[USER] * 100_000)),
    (
        "parts",
        CHAT,
        "messages",
        lambda: packed(messages=[{**USER, "content": [PART] * 100_000}]),
    ),
    ("messages to tokenize", "/tokenize", "messages", lambda: packed(messages=[USER] * 100_000)),
    (
        "keys of a message",
        CHAT,
        "messages",
        lambda: packed(messages=[{**USER, **KEYS}]),
    ),
    ("annotations", CHAT, "messages", lambda: packed(messages=[{**USER, "annotations": LISTS}])),
    ("tool calls", CHAT, "messages", lambda: packed(messages=[{**USER, "tool_calls": LISTS}])),
    (
        "variables",
        CHAT,
        "chat_template_kwargs",
        lambda: packed(messages=[USER], chat_template_kwargs={"a": LISTS}),
    ),
    ("stop ids", PATH, "stop_token_ids", lambda: packed(prompt="a", stop_token_ids=[5] * 1_000_000)),
    ("allowed ids", PATH, "allowed_token_ids", lambda: packed(prompt="a", allowed_token_ids=[5] * 1_000_000)),
    ("biases", PATH, "logit_bias", lambda: packed(prompt="a", logit_bias={str(i): 1 for i in range(300_000)})),
    ("stops", PATH, "stop", lambda: packed(prompt="a", stop=["a"] * 1_000_000)),
    ("a long stop", PATH, "stop", lambda: packed(prompt="a", stop="a" * 4_000_000)),
    ("unknown fields", PATH, "u0", lambda: packed(prompt="a", **KEYS)),
    ("tools", PATH, "tools", lambda: packed(prompt="a", tools=[{}] * 1_000_000)),
    ("a name", PATH, "model", lambda: packed(prompt="a", model="m" * 4_000_000)),
    ("digits", PATH, "seed", lambda: b'{"prompt":"a","seed":' + b"9" * 4_000_000 + b"}"),
    ("tokens", "/detokenize", "tokens", lambda: packed(tokens=[1] * 2_000_000)),
    ("text", PATH, "prompt", lambda: packed(prompt="a" * 4_000_000)),
    ("text to tokenize", "/tokenize", "prompt", lambda: packed(prompt="a" * 4_000_000)),
]


@pytest.mark.parametrize(("path", "field", "make_body"), [row[1:] for row in MANY], ids=[row[0] for row in MANY])
def test_too_many_of_anything_is_refused_cheaply(
    fake: Any, path: str, field: str, make_body: Callable[[], bytes]
) -> None:
    body = make_body()
    answer, seconds = ask(fake, path, body)
    assert answer.status_code == 400, answer.text[:300]
    error = answer.json()["error"]
    assert error["param"] == field and len(answer.content) < 1000
    assert seconds < 0.05  # it was seconds
    assert ask(fake, PATH, packed(prompt="a", max_tokens=1))[0].status_code == 200


@pytest.mark.parametrize("many", [1_000, 100_000, 1_000_000])
def test_fields_that_nobody_reads_are_only_scanned(fake: Any, many: int) -> None:
    answer, seconds = ask(fake, PATH, packed(prompt="a", max_tokens=1, metadata=[[]] * many))
    assert answer.status_code == 200 and seconds < 0.05


@pytest.mark.parametrize(
    "prompt",
    [["a", "b"], ['"', '\\"', "\\"], ["a,b", "[1]", "{"], [[1, 2], [3]], [1, 2, 3], "a", " [1]", ["[", "]"]],
    ids=str,
)
def test_prompts_of_every_form_are_told_apart(fake: Any, prompt: Any) -> None:
    for form in (json.dumps(prompt), json.dumps(prompt, indent=3), json.dumps(prompt, separators=(",", ":"))):
        answer, _ = ask(fake, PATH, b'{"max_tokens":1,"echo":true,"prompt":' + form.encode() + b"}")
        texts = [choice["text"][:-1] for choice in answer.json()["choices"]]
        if isinstance(prompt, str):
            assert texts == [prompt]
        elif isinstance(prompt[0], int):
            assert texts == [bytes(prompt).decode()]
        else:
            assert texts == [item if isinstance(item, str) else bytes(item).decode() for item in prompt]


def test_as_many_prompts_as_fit_are_taken(make: Any) -> None:
    served = make(max_waiting=56)  # 64 with those that run
    for text in ("a", '"', "\\", '\\"', ",", "[", '","'):
        body = packed(prompt=[text] * 64, max_tokens=1)
        assert len(ask(served, PATH, body)[0].json()["choices"]) == 64
        refused, _ = ask(served, PATH, packed(prompt=[text] * 65, max_tokens=1))
        assert refused.status_code == 400 and refused.json()["error"]["code"] == "capacity"
    assert ask(served, PATH, packed(prompt=["a"] * 32, n=2, max_tokens=1))[0].status_code == 200
    assert ask(served, PATH, packed(prompt=["a"] * 32, n=3, max_tokens=1))[0].status_code == 400


def test_lists_as_long_as_the_vocabulary_are_taken(fake: Any) -> None:
    every = list(range(260))
    for fields in (
        {"stop_token_ids": every[1:97]},
        {"stop_token_ids": [5] * 260},
        {"allowed_token_ids": every},
        {"logit_bias": {str(token): 1 for token in every}},
        {"stop": ["x" * 1024] * 64},
    ):
        answer, _ = ask(fake, PATH, packed(prompt="a", max_tokens=2, **fields))
        assert answer.status_code == 200 and answer.json()["choices"][0]["text"] == "bc", fields
    for fields in ({"stop_token_ids": [5] * 261}, {"allowed_token_ids": [*every, 5]}):
        assert ask(fake, PATH, packed(prompt="a", **fields))[0].status_code == 400


@pytest.mark.parametrize("inline", [0, 4096])
def test_a_text_that_fits_is_never_refused_for_its_length(
    make: Any, monkeypatch: pytest.MonkeyPatch, inline: int
) -> None:
    monkeypatch.setattr(context, "_INLINE_CHARACTERS", inline)
    monkeypatch.setattr(context, "_INLINE_TOKENS", inline or 16)
    served = make(max_model_len=512)
    for text in ("a" * 511, "é" * 255, "<eos>" * 511, "\U0001f600" * 127):
        body = ask(served, "/tokenize", packed(prompt=text, return_token_strs=True))[0].json()
        assert 508 <= body["count"] == len(body["token_strs"]) <= 511
        assert ask(served, "/detokenize", packed(tokens=body["tokens"]))[0].json() == {"prompt": text}
        answer, _ = ask(served, PATH, packed(prompt=text, max_tokens=1))
        assert answer.status_code == 200, answer.text[:200]
    long = "a" * 1_000_000
    kept, _ = ask(served, PATH, packed(prompt=long + "xyz", truncate_prompt_tokens=3, max_tokens=1, echo=True))
    assert kept.json()["choices"][0]["text"][:3] == "xyz"
    refused, _ = ask(served, PATH, packed(prompt=long))
    assert refused.json()["error"]["code"] == "context_length_exceeded" and "1000000" in refused.text
    over, _ = ask(served, PATH, packed(prompt="a" * 513))
    assert "513 input tokens" in over.json()["error"]["message"]


def test_what_waits_to_be_tokenized_is_bounded(make: Any) -> None:
    served = make(max_body_size=10_000)  # four bodies may wait
    body = packed(prompt="a" * 9_000, truncate_prompt_tokens=3, max_tokens=1)

    async def go() -> list[int]:
        served.ctx.engine_client.attach(asyncio.get_running_loop())
        async with served.client() as client:
            asked = [client.post(PATH, content=body, headers={"content-type": "application/json"}) for _ in range(9)]
            return sorted(answer.status_code for answer in await asyncio.gather(*asked))

    began = asyncio.run(go())
    assert began == [200] * 4 + [429] * 5 and served.ctx.aside.waiting == 0
    assert asyncio.run(go()) == began


def test_a_message_keeps_what_templates_may_read(make: Any) -> None:
    served = make(template=ChatTemplate("{{ messages | tojson }}"), max_model_len=4096)
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {"x": 1}}], "name": "n"},
        {"role": "assistant", "content": None, "refusal": None, "annotations": [], "tool_calls": [], "audio": None},
        {"role": "assistant", "content": "b", "reasoning": "r\n", "annotations": [{"url": "u"}], "refusal": "no"},
    ]
    tokens = ask(served, "/tokenize", packed(messages=messages))[0].json()["tokens"]
    assert json.loads(bytes(tokens)) == [
        {"role": "user", "content": "a", "name": "n"},
        {"role": "assistant", "content": ""},
        {"role": "assistant", "content": "b", "refusal": "no", "annotations": [{"url": "u"}], "reasoning": "r\n"},
    ]


LONG = {"max_tokens": 100, "ignore_eos": True, "n": 16}
ANSWERS: list[tuple[str, str, dict[str, Any]]] = [
    ("logprobs", PATH, {"prompt": "a", "logprobs": 20, **LONG}),
    ("streamed logprobs", PATH, {"prompt": "a", "logprobs": 20, "stream": True, **LONG}),
    ("chat logprobs", CHAT, {"messages": [USER], "logprobs": True, "top_logprobs": 20, **LONG}),
    ("prompt logprobs", PATH, {"prompt": "a" * 500, "prompt_logprobs": 20, "max_tokens": 1, "n": 4}),
    (
        "chat prompt logprobs",
        CHAT,
        {"messages": [{**USER, "content": "a" * 400}], "prompt_logprobs": 20, "max_tokens": 1},
    ),
    ("echo", PATH, {"prompt": "a" * 500, "logprobs": 20, "echo": True, "max_tokens": 1, "n": 16}),
    (
        "streamed echo",
        PATH,
        {"prompt": "a" * 500, "logprobs": 20, "echo": True, "max_tokens": 1, "n": 16, "stream": True},
    ),
    ("echo of many", PATH, {"prompt": ["a" * 100] * 16, "logprobs": 20, "echo": True, "max_tokens": 1}),
    ("stops", PATH, {"prompt": "a", "stop": ["b" * 1000 + chr(97 + i) for i in range(26)], **LONG}),
    ("lists", PATH, {"prompt": "a", "stop_token_ids": [5] * 260, "allowed_token_ids": list(range(260)), **LONG}),
]


@pytest.mark.parametrize(("path", "fields"), [row[1:] for row in ANSWERS], ids=[row[0] for row in ANSWERS])
def test_a_long_answer_lets_others_have_their_turn(make: Any, path: str, fields: dict[str, Any]) -> None:
    served = make(max_waiting=100, pages=256)
    answer, seconds = ask(served, path, packed(**fields))
    assert answer.status_code == 200, answer.text[:300]
    assert seconds < 0.05
    assert served.ctx.engine_client.held.used == 0
