"""What a server must refuse, each with its status and a message that names what is wrong, and go on serving."""

from __future__ import annotations

import json
from typing import Any

import pytest

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
PATHS = {
    "/v1/completions": {"prompt": "abc", "max_tokens": 2},
    "/v1/chat/completions": CHAT,
}


def refused(answer: Any, status: int, *words: str, param: str | None = None, code: str | None = None) -> None:
    """The answer is an OpenAI error object with this status, these words, and this field."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    for word in words:
        assert word in error["message"], error
    if param is not None:
        assert error["param"] == param, error
    if code is not None:
        assert error["code"] == code, error


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 1e300),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", -2),
        ("top_k", 1.5),
        ("min_p", -1),
        ("n", 0),
        ("n", 10**9),
        ("n", True),
        ("max_tokens", -1),
        ("max_tokens", 1.5),
        ("max_tokens", 10**30),
        ("min_tokens", -1),
        ("min_tokens", 3),
        ("presence_penalty", 3),
        ("frequency_penalty", -3),
        ("repetition_penalty", 0),
        ("repetition_penalty", -1),
        ("seed", 10**30),
        ("seed", 0.5),
        ("stop", ["a"] * 65),
        ("stop", ""),
        ("stop", [1]),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [260]),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"5": 101}),
        ("logit_bias", {"-5": 1}),
        ("logit_bias", {"260": 1}),
        ("logit_bias", [1]),
        ("allowed_token_ids", []),
        ("best_of", 3),
        ("truncate_prompt_tokens", 0),
        ("stream", "yes"),
        ("stream_options", {"include_usage": True}),
        ("model", 3),
    ],
)
def test_absurd_values_are_refused_by_field(fake: Any, path: str, field: str, value: Any) -> None:
    refused(fake.post(path, **{**PATHS[path], field: value}), 400, param=field)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("functions", [{}]),
        ("response_format", {"type": "json_schema", "json_schema": {}}),
        ("response_format", {"type": "json_object"}),
        ("guided_json", {}),
        ("structured_outputs", {"regex": "a"}),
        ("suffix", "x"),
        ("use_beam_search", True),
        ("use_beam_search", 1),
        ("priority", 2),
        ("priority", False),
        ("modalities", ["audio"]),
        ("reasoning_effort", "high"),
        ("bad_words", ["x"]),
        ("store", True),
    ],
)
def test_features_that_we_lack_are_refused_not_ignored(fake: Any, path: str, field: str, value: Any) -> None:
    refused(fake.post(path, **PATHS[path], **{field: value}), 400, field, param=field, code="unsupported_field")


@pytest.mark.parametrize("path", PATHS)
def test_fields_that_change_nothing_are_taken(fake: Any, path: str) -> None:
    harmless = {
        "user": "u",
        "metadata": {"a": "b"},
        "tool_choice": "none",
        "tools": None,
        "suffix": None,
        "store": False,
    }
    fields = {
        **PATHS[path],
        **harmless,
        "response_format": {"type": "text"},
        "parallel_tool_calls": False,
        "best_of": 1,
    }
    assert fake.post(path, **fields, service_tier="auto", stop=None, logit_bias=None, seed=None).status_code == 200


def test_an_unknown_field_is_refused_with_the_nearest_name(fake: Any) -> None:
    refused(fake.post("/v1/completions", prompt="a", max_token=1), 400, "max_token", "`max_tokens`", param="max_token")
    refused(fake.post("/v1/completions", prompt="a", zzz=1), 400, "zzz", param="zzz", code="unknown_field")
    refused(fake.post("/v1/completions", prompt="a", stream=True, stream_options={"usage": True}), 400, "usage")


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b'{"prompt": "a", "temperature": NaN}', "JSON"),
        (b'{"prompt": "a", "temperature": Infinity}', "JSON"),
        (b'{"prompt": "a", "temperature": 1e999}', "range"),
        (b'{"prompt": "a"} x', "JSON"),
        (b'{"prompt": "\xff\xfe"}', "UTF-8"),
        (b'{"prompt": "\xed\xa0\x80"}', "UTF-8"),
        (b'{"prompt": "\\ud800"}', "JSON"),
        (b'{"prompt": ' + b"[" * 200_000, "nested"),
        (b'["prompt"]', "object"),
        (b"null", "object"),
        (b"{}", "prompt"),
        (b'{"prompt": null}', "prompt"),
        (b'{"prompt": 5}', "prompt"),
        (b'{"prompt": []}', "prompt"),
        (b'{"prompt": [[]]}', "token"),
        (b'{"prompt": ""}', "token"),
        (b'{"prompt": ["a", 1]}', "prompt"),
        (b'{"prompt": ["a", [1]]}', "prompt"),
        (b'{"prompt": [true]}', "prompt"),
        (b'{"prompt": [-1]}', "-1"),
        (b'{"prompt": [260]}', "260"),
        (b'{"prompt": [99999999999999999999999999]}', "vocabulary"),
        (b'{"prompt": [[1], [1.5]]}', "prompt"),
    ],
)
def test_malformed_bodies(fake: Any, body: bytes, word: str) -> None:
    answer = fake.ask("POST", "/v1/completions", content=body, headers={"content-type": "application/json"})
    refused(answer, 400, word)


def test_a_prompt_longer_than_the_model_names_both_numbers(make: Any) -> None:
    served = make(max_model_len=32)
    too_long = served.post("/v1/completions", prompt="a" * 40)
    refused(too_long, 400, "32 tokens", "40 input tokens", param="prompt", code="context_length_exceeded")
    exactly = served.post("/v1/completions", prompt="a" * 32)
    refused(exactly, 400, "32 tokens", code="context_length_exceeded")
    explicit = served.post("/v1/completions", prompt="a" * 30, max_tokens=3)
    refused(explicit, 400, "3 > 32 - 30", param="max_tokens", code="context_length_exceeded")
    chat = served.post("/v1/chat/completions", messages=[{"role": "user", "content": "a" * 40}])
    refused(chat, 400, "32 tokens", param="messages")


def test_a_limit_that_nobody_gave_is_lowered(make: Any) -> None:
    body = make(max_model_len=32).post("/v1/completions", prompt="a" * 30).json()
    assert body["usage"]["completion_tokens"] == 2 and body["choices"][0]["finish_reason"] == "length"


def test_more_tokens_than_the_whole_pool(make: Any) -> None:
    served = make(pages=4)
    refused(served.post("/v1/completions", prompt="a" * 80), 400, "64", param="prompt", code="capacity")
    refused(served.post("/v1/completions", prompt="a" * 30, max_tokens=40), 400, "70", "64", code="capacity")
    assert served.post("/v1/completions", prompt="a" * 60).json()["usage"]["completion_tokens"] == 4


def test_more_prompts_than_the_server_takes_at_once(make: Any) -> None:
    served = make(max_waiting=2)
    refused(served.post("/v1/completions", prompt=["a"] * 11, max_tokens=1), 400, "11", code="capacity")
    assert served.post("/v1/completions", prompt=["a"] * 10, max_tokens=1).status_code == 200
    refused(served.post("/v1/chat/completions", **CHAT, n=11), 400, "11", param="n", code="capacity")


def test_unknown_models_paths_and_methods(fake: Any) -> None:
    refused(fake.post("/v1/completions", model="gpt-9", prompt="a"), 404, "gpt-9", "made-up", code="model_not_found")
    refused(fake.ask("GET", "/v1/models/gpt-9"), 404, code="model_not_found")
    refused(fake.ask("GET", "/v1/nothing"), 404, "/v1/nothing", code="path_not_found")
    answer = fake.ask("GET", "/v1/completions")
    refused(answer, 405, "POST", code="method_not_allowed")
    assert "POST" in answer.headers["allow"]
    refused(fake.ask("DELETE", "/health"), 405)


def test_body_limits(make: Any) -> None:
    served = make(max_body_size=1000)
    big = json.dumps({"prompt": "a" * 2000}).encode()

    async def chunks() -> Any:
        for start in range(0, len(big), 100):
            yield big[start : start + 100]

    kind = {"content-type": "application/json"}
    refused(served.ask("POST", "/v1/completions", content=big, headers=kind), 413, "1000", code="body_too_large")
    refused(served.ask("POST", "/v1/completions", content=chunks(), headers=kind), 413, "1000", code="body_too_large")
    assert served.post("/v1/completions", prompt="a" * 300, max_tokens=1).status_code == 200


@pytest.mark.parametrize(
    "kind",
    [
        None,  # what a Blob without a type sends
        "",
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "text/plain;application/json",
        "text/plain, application/json",
        "application/jsonp",
        "json",
    ],
)
def test_what_a_web_page_can_post_across_origins_is_refused(fake: Any, kind: str | None) -> None:
    body = b'{"prompt": "a", "max_tokens": 1}'
    headers = {} if kind is None else {"content-type": kind}
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        refused(fake.ask("POST", path, content=body, headers=headers), 415, "application/json", code="content_type")
    for good in ("application/json; charset=utf-8", "application/vnd.x+json"):
        assert fake.ask("POST", "/v1/completions", content=body, headers={"content-type": good}).status_code == 200
    refused(fake.ask("POST", "/v1/completions", content=body, headers={"content-encoding": "gzip"}), 415)


def test_keys(make: Any) -> None:
    served = make(keys=("secret-1", "secret-2"))
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret-1"}, {"authorization": "Bearer "}):
        for method, path in (("GET", "/v1/models"), ("POST", "/v1/completions"), ("POST", "/tokenize"), ("GET", "/x")):
            answer = served.ask(method, path, headers=headers)
            refused(answer, 401, code="invalid_api_key")
            assert answer.headers["www-authenticate"] == "Bearer"
    for key in ("secret-1", "secret-2"):
        assert served.ask("GET", "/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200
    for path in ("/health", "/ping", "/metrics", "/version"):
        assert served.ask("GET", path).status_code == 200


def test_the_log_holds_no_secrets(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    served = make(keys=("secret-1",))
    with caplog.at_level("DEBUG"):
        served.ask("GET", "/v1/models?api_key=secret-1", headers={"authorization": "Bearer secret-1"})
        served.ask("GET", "/v1/models", headers={"authorization": "Bearer secret-2"})
        served.ask("GET", "/a%0Ab")
    lines = [r.getMessage() for r in caplog.records if r.name == "xllm.access"]
    assert len(lines) == 3 and " 200 " in lines[0] and " 401 " in lines[1]
    assert not any("secret" in line or "\n" in line for line in lines)


def test_request_ids_are_echoed_when_they_are_sane(fake: Any) -> None:
    assert fake.ask("GET", "/health", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    assert fake.ask("GET", "/health", headers={"x-request-id": "x" * 300}).headers["x-request-id"] != "x" * 300
    assert len(fake.ask("GET", "/v1/nothing").headers["x-request-id"]) == 32


def test_an_engine_failure_is_our_fault_and_the_next_request_is_served(fake: Any) -> None:
    fake.executor.fail = True
    refused(fake.post("/v1/completions", prompt="a"), 500, "internal", code="internal_error")
    streamed = fake.post("/v1/completions", prompt="a", stream=True)
    refused(streamed, 500)  # nothing had been sent, so the status can still say it
    fake.executor.fail = False
    assert fake.post("/v1/completions", prompt="a", max_tokens=1).status_code == 200
    assert "made to fail" not in streamed.text
