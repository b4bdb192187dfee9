"""/v1/completions against an engine whose answers are known: after "a" comes "b", with a known log-probability."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

PATH = "/v1/completions"
# NextByte's logits: 5 for the next byte, 3 for the one after, 0 for the other 258.
TOTAL = math.exp(5) + math.exp(3) + 258
BEST, SECOND, REST = 5 - math.log(TOTAL), 3 - math.log(TOTAL), -math.log(TOTAL)


def events(text: str) -> list[dict[str, Any]]:
    """The chunks of a stream, which must end with [DONE]."""
    lines = [line for line in text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


def test_an_answer_has_openai_s_shape(fake: Any) -> None:
    answer = fake.post(PATH, model="made-up", prompt="abc", max_tokens=3)
    assert answer.status_code == 200
    body = answer.json()
    assert body.pop("id").startswith("cmpl-") and body.pop("created") > 0
    choice = {"index": 0, "text": "def", "logprobs": None, "finish_reason": "length", "stop_reason": None}
    assert body == {
        "object": "text_completion",
        "model": "made-up",
        "choices": [choice],
        "system_fingerprint": "a" * 64,
        "usage": {"prompt_tokens": 3, "total_tokens": 6, "completion_tokens": 3},
    }


def test_sixteen_tokens_unless_told_otherwise(fake: Any) -> None:
    assert fake.post(PATH, prompt="a").json()["usage"]["completion_tokens"] == 16


def test_an_alias_is_answered_under_its_name(fake: Any) -> None:
    assert fake.post(PATH, model="alias", prompt="a", max_tokens=1).json()["model"] == "alias"


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("ab", ["cd"]),
        (["ab", "kl"], ["cd", "mn"]),
        ([97, 98], ["cd"]),
        ([[97, 98], [107, 108]], ["cd", "mn"]),
    ],
)
def test_prompts_in_four_forms(fake: Any, prompt: Any, texts: list[str]) -> None:
    body = fake.post(PATH, prompt=prompt, max_tokens=2).json()
    assert [choice["text"] for choice in body["choices"]] == texts
    assert [choice["index"] for choice in body["choices"]] == list(range(len(texts)))
    assert body["usage"]["prompt_tokens"] == 2 * len(texts)


def test_choices_of_prompts_are_numbered_as_openai_does(fake: Any) -> None:
    body = fake.post(PATH, prompt=["ab", "kl"], n=2, best_of=2, max_tokens=1).json()
    assert [(c["index"], c["text"]) for c in body["choices"]] == [(0, "c"), (1, "c"), (2, "m"), (3, "m")]
    assert body["usage"] == {"prompt_tokens": 4, "total_tokens": 8, "completion_tokens": 4}


def test_why_it_stopped(fake: Any) -> None:
    eos = fake.post(PATH, prompt="x", max_tokens=9).json()["choices"][0]
    assert (eos["text"], eos["finish_reason"], eos["stop_reason"]) == ("yz", "stop", None)
    text = fake.post(PATH, prompt="a", max_tokens=9, stop=["q", "ef"]).json()["choices"][0]
    assert (text["text"], text["finish_reason"], text["stop_reason"]) == ("bcd", "stop", "ef")
    kept = fake.post(PATH, prompt="a", max_tokens=9, stop="ef", include_stop_str_in_output=True).json()["choices"][0]
    assert kept["text"] == "bcdef"
    token = fake.post(PATH, prompt="a", max_tokens=9, stop_token_ids=[100]).json()["choices"][0]
    assert (token["finish_reason"], token["stop_reason"]) == ("stop", 100)
    onward = fake.post(PATH, prompt="x", max_tokens=4, ignore_eos=True).json()["choices"][0]
    assert onward["finish_reason"] == "length"


def test_bias_and_allowed_tokens_change_the_answer(fake: Any) -> None:
    assert fake.post(PATH, prompt="a", max_tokens=1, logit_bias={"113": 100}).json()["choices"][0]["text"] == "q"
    assert fake.post(PATH, prompt="a", max_tokens=1, allowed_token_ids=[99]).json()["choices"][0]["text"] == "c"


def test_a_seed_repeats_an_answer(fake: Any) -> None:
    def draw(seed: int) -> str:
        return fake.post(PATH, prompt="a", max_tokens=12, temperature=2.0, seed=seed).json()["choices"][0]["text"]

    assert draw(1) == draw(1)
    assert len({draw(seed) for seed in range(4)}) > 1


def test_logprobs_in_the_legacy_shape(fake: Any) -> None:
    got = fake.post(PATH, prompt="a", max_tokens=2, logprobs=2).json()["choices"][0]["logprobs"]
    assert got["tokens"] == ["b", "c"] and got["text_offset"] == [0, 1]
    assert got["token_logprobs"] == pytest.approx([BEST, BEST], abs=1e-5)
    assert got["top_logprobs"][0] == pytest.approx({"b": BEST, "c": SECOND}, abs=1e-5)


def test_logprobs_of_a_token_outside_the_top_are_listed_too(fake: Any) -> None:
    got = fake.post(PATH, prompt="a", max_tokens=1, logprobs=1, allowed_token_ids=[113]).json()["choices"][0][
        "logprobs"
    ]
    assert got["token_logprobs"] == pytest.approx([REST], abs=1e-5)
    assert got["top_logprobs"][0] == pytest.approx({"b": BEST, "q": REST}, abs=1e-5)


@pytest.mark.parametrize("limit", [0, 1])
def test_echo_scores_the_prompt(fake: Any, limit: int) -> None:
    """What evaluation tools ask for: the prompt's log-probabilities, the first of them null."""
    body = fake.post(PATH, prompt=[97, 98, 100], max_tokens=limit, logprobs=1, echo=True).json()
    choice, got = body["choices"][0], body["choices"][0]["logprobs"]
    assert choice["text"] == "abd" + "e" * limit
    assert body["usage"]["completion_tokens"] == limit
    assert got["token_logprobs"][0] is None and got["top_logprobs"][0] is None
    assert got["token_logprobs"][1:] == pytest.approx([BEST, SECOND] + [BEST] * limit, abs=1e-5)
    assert got["top_logprobs"][2] == pytest.approx({"c": BEST, "d": SECOND}, abs=1e-5)
    assert got["text_offset"] == list(range(3 + limit)) and len(got["tokens"]) == 3 + limit


def test_echo_alone_gives_the_text_back(fake: Any) -> None:
    assert fake.post(PATH, prompt="abc", max_tokens=2, echo=True).json()["choices"][0]["text"] == "abcde"
    assert fake.post(PATH, prompt="abc", max_tokens=0, echo=True).json()["choices"][0]["text"] == "abc"


def test_two_tokens_with_one_text_keep_the_likelier(fake: Any) -> None:
    """Bytes above 127 are no text on their own; all show as U+FFFD, and a greedy match must still be seen as one."""
    got = fake.post(PATH, prompt=[200], max_tokens=1, logprobs=2).json()["choices"][0]["logprobs"]
    assert max(got["top_logprobs"][0].values()) == got["token_logprobs"][0]


def test_token_ids_on_request(fake: Any) -> None:
    body = fake.post(PATH, prompt="ab", max_tokens=2, return_token_ids=True).json()["choices"][0]
    assert (body["prompt_token_ids"], body["token_ids"]) == ([97, 98], [99, 100])
    named = fake.post(PATH, prompt="ab", max_tokens=1, logprobs=0, return_tokens_as_token_ids=True).json()
    assert named["choices"][0]["logprobs"]["tokens"] == ["token_id:99"]


def test_prompt_logprobs_by_token_id(fake: Any) -> None:
    rows = fake.post(PATH, prompt="ab", max_tokens=1, prompt_logprobs=0).json()["choices"][0]["prompt_logprobs"]
    assert rows[0] is None and rows[1]["98"]["rank"] == 1 and rows[1]["98"]["decoded_token"] == "b"


def test_truncation_keeps_the_end(fake: Any) -> None:
    body = fake.post(PATH, prompt="abcde", max_tokens=1, truncate_prompt_tokens=2, echo=True).json()
    assert body["choices"][0]["text"] == "def" and body["usage"]["prompt_tokens"] == 2


def test_a_stream_says_the_same_as_a_whole_answer(fake: Any) -> None:
    ask = {"prompt": ["ab", "wx"], "n": 2, "max_tokens": 5, "logprobs": 1, "echo": True, "stop": "fg"}
    whole = fake.post(PATH, **ask).json()
    chunks = events(fake.post(PATH, **ask, stream=True, stream_options={"include_usage": True}).text)
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert len({chunk["id"] for chunk in chunks}) == 1
    for choice in whole["choices"]:
        parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert parts[-1]["finish_reason"] == choice["finish_reason"]
        assert all(part["finish_reason"] is None for part in parts[:-1])
        for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
            joined = [item for part in parts if part["logprobs"] for item in part["logprobs"][name]]
            assert joined == choice["logprobs"][name]


def test_a_stream_without_usage_has_no_usage_key(fake: Any) -> None:
    chunks = events(fake.post(PATH, prompt="a", max_tokens=2, stream=True).text)
    assert [c["choices"][0]["text"] for c in chunks] == ["b", "c"] and "usage" not in chunks[0]


def test_usage_on_every_chunk_when_asked(fake: Any) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events(fake.post(PATH, prompt="a", max_tokens=3, stream=True, stream_options=options).text)
    assert [c["usage"]["completion_tokens"] for c in chunks] == [1, 2, 3, 3]
