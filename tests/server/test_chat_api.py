"""/v1/chat/completions, /tokenize and /detokenize against an engine whose answers are known."""

from __future__ import annotations

import json
from typing import Any

import pytest

from xllm_compiler.runtime.chat_template import ChatTemplate

PATH = "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "hi"}]}
PROMPT = "<|user|>hi\n<|assistant|>"  # ends in ">", after which come "?", "@", "A", ...


def test_an_answer_has_openai_s_shape(fake: Any) -> None:
    body = fake.post(PATH, **ASK, model="made-up", max_completion_tokens=3).json()
    assert body.pop("id").startswith("chatcmpl-") and body.pop("created") > 0
    message = {"role": "assistant", "content": "?@A", "refusal": None}
    assert body == {
        "object": "chat.completion",
        "model": "made-up",
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "length", "stop_reason": None}],
        "system_fingerprint": "a" * 64,
        "usage": {"prompt_tokens": len(PROMPT), "total_tokens": len(PROMPT) + 3, "completion_tokens": 3},
    }


def test_a_chat_runs_to_the_model_s_length_unless_told_otherwise(make: Any) -> None:
    body = make(max_model_len=40).post(PATH, **ASK, ignore_eos=True).json()
    assert body["usage"]["total_tokens"] == 40 and body["choices"][0]["finish_reason"] == "length"


def test_a_stream_starts_with_the_role_and_ends_with_the_usage(fake: Any) -> None:
    answer = fake.post(PATH, **ASK, max_tokens=2, n=2, stream=True, stream_options={"include_usage": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = answer.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(line[6:]) for line in lines[:-2]]
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    for index in (0, 1):
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(c["delta"].get("content", "") for c in mine) == "?@"
        assert [c["finish_reason"] for c in mine] == [None, None, "length"]
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 4


def test_logprobs_in_the_chat_shape(fake: Any) -> None:
    body = fake.post(PATH, **ASK, max_tokens=1, logprobs=True, top_logprobs=2).json()
    (entry,) = body["choices"][0]["logprobs"]["content"]
    assert (entry["token"], entry["bytes"]) == ("?", [ord("?")])
    assert [top["token"] for top in entry["top_logprobs"]] == ["?", "@"]
    assert entry["top_logprobs"][0]["logprob"] == entry["logprob"] > entry["top_logprobs"][1]["logprob"]
    bare = fake.post(PATH, **ASK, max_tokens=1, logprobs=True).json()["choices"][0]["logprobs"]["content"][0]
    assert bare["top_logprobs"] == []


def test_text_parts_are_joined_and_history_of_a_client_is_taken(fake: Any) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    old = {"role": "assistant", "content": "x", "refusal": None, "tool_calls": None, "annotations": []}
    messages = [{"role": "user", "content": parts}, old, {"role": "user", "content": "y"}]
    tokens = fake.post("/tokenize", messages=messages).json()["tokens"]
    assert bytes(tokens).decode() == "<|user|>a\nb\n<|assistant|>x\n<|user|>y\n<|assistant|>"


def test_the_final_message_can_be_continued(fake: Any) -> None:
    messages = [*ASK["messages"], {"role": "assistant", "content": "ab"}]
    body = fake.post(PATH, messages=messages, continue_final_message=True, max_tokens=2).json()
    assert body["choices"][0]["message"]["content"] == "cd"


@pytest.mark.parametrize(
    ("message", "word"),
    [
        ({"content": "x"}, "role"),
        ({"role": "user"}, "content"),
        ({"role": "user", "content": 3}, "content"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}, "image_url"),
        ({"role": "user", "content": [{"type": "text"}]}, "text"),
        ({"role": "user", "content": ["x"]}, "type"),
        ({"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}, "tool_calls"),
        ({"role": "user", "content": "x", "colour": "red"}, "colour"),
    ],
)
def test_a_message_that_we_cannot_honour_is_refused_by_name(fake: Any, message: Any, word: str) -> None:
    answer = fake.post(PATH, messages=[message])
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "messages" and word in answer.json()["error"]["message"]


@pytest.mark.parametrize("name", ["chat_template", "messages", "tools", "add_generation_prompt"])
def test_template_variables_cannot_replace_the_template(fake: Any, name: str) -> None:
    answer = fake.post(PATH, **ASK, chat_template_kwargs={name: "{{ 7 * 7 }}"})
    assert answer.status_code == 400 and name in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "name",
    ["self", "variables", "text", "source", "args", "kwargs", "context", "__class__", "loop", "a b", "", "ä", "1"],
)
@pytest.mark.parametrize("own", [True, False])
def test_a_template_variable_may_have_any_name(make: Any, name: str, own: bool) -> None:
    served = make(template=None if own else ChatTemplate("{{ messages[0].content }}"))
    plain = served.post(PATH, **ASK, max_tokens=2)
    answer = served.post(PATH, **ASK, max_tokens=2, chat_template_kwargs={name: 1})
    assert answer.status_code == plain.status_code == 200, answer.text
    assert answer.json()["choices"] == plain.json()["choices"]


def test_a_template_sees_the_variables_of_the_request(make: Any) -> None:
    served = make(template=ChatTemplate("{{ colour }}"))
    for name, value, text in (("colour", "red", b"red"), ("colour", [1], b"[1]"), ("color", "red", b"")):
        answer = served.post("/tokenize", **ASK, chat_template_kwargs={name: value})
        assert bytes(answer.json()["tokens"]) == text


def test_empty_messages_are_refused(fake: Any) -> None:
    assert fake.post(PATH, messages=[]).status_code == 400


def test_tokenize_and_detokenize_are_inverse(fake: Any) -> None:
    body = fake.post("/tokenize", prompt="héllo", return_token_strs=True).json()
    assert bytes(body["tokens"]) == "héllo".encode() and body["count"] == 6 and body["max_model_len"] == 512
    assert body["token_strs"][0] == "h"
    assert fake.post("/detokenize", tokens=body["tokens"]).json() == {"prompt": "héllo"}
    assert fake.post("/detokenize", tokens=[97, 256]).json() == {"prompt": "a<eos>"}


@pytest.mark.parametrize("tokens", [[-1], [260], [10**30], [2**32], ["a"], [1.5]])
def test_detokenize_refuses_what_is_no_token(fake: Any, tokens: Any) -> None:
    assert fake.post("/detokenize", tokens=tokens).status_code == 400


def test_tokenize_wants_one_of_two(fake: Any) -> None:
    assert fake.post("/tokenize").status_code == 400
    assert fake.post("/tokenize", prompt="a", messages=[]).status_code == 400


def test_tokenizer_info_names_the_special_tokens(fake: Any) -> None:
    info = fake.ask("GET", "/tokenizer_info").json()
    assert info["eos_token"] == "<eos>" and info["bos_token"] is None
