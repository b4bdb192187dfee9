"""Sampling settings: vLLM's defaults, and every absurd value refused by the field's name."""

from __future__ import annotations

import math
from typing import Any

import pytest

from xllm_compiler.errors import XllmError
from xllm_compiler.runtime.sampling_params import SamplingParams

BAD: list[tuple[str, Any]] = [
    ("n", 0),
    ("n", 10**6),
    ("n", True),
    ("n", 1.0),
    ("temperature", -0.1),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("temperature", 1e30),
    ("temperature", "hot"),
    ("temperature", None),
    ("top_p", 0.0),
    ("top_p", 1.1),
    ("top_p", math.nan),
    ("top_k", -2),
    ("top_k", 1.5),
    ("min_p", -0.1),
    ("min_p", 1.1),
    ("presence_penalty", 2.1),
    ("frequency_penalty", -2.1),
    ("frequency_penalty", math.nan),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", -1.0),
    ("repetition_penalty", math.inf),
    ("seed", 1 << 64),
    ("seed", "7"),
    ("max_tokens", 0),
    ("max_tokens", -5),
    ("max_tokens", 3.0),
    ("min_tokens", -1),
    ("min_tokens", 17),
    ("logprobs", -1),
    ("logprobs", 21),
    ("prompt_logprobs", 10**9),
    ("stop", [""]),
    ("stop", [1]),
    ("stop", ["a"] * 1000),
    ("stop", ["a" * 10**6]),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", "12"),
    ("stop_token_ids", [1.5]),
    ("allowed_token_ids", []),
    ("allowed_token_ids", [True]),
    ("logit_bias", {1: math.nan}),
    ("logit_bias", {1: 101}),
    ("logit_bias", {"x": 1}),
    ("logit_bias", {-1: 1}),
    ("logit_bias", [1]),
    ("ignore_eos", 1),
    ("detokenize", None),
]


@pytest.mark.parametrize(("field", "value"), BAD, ids=lambda v: str(v)[:20])
def test_absurd_values_are_refused(field: str, value: Any) -> None:
    with pytest.raises(XllmError) as caught:
        SamplingParams(**{field: value})
    assert caught.value.kind == "request" and caught.value.where == field
    assert field in caught.value.message and len(caught.value.message) < 400


def test_the_edges_are_allowed() -> None:
    SamplingParams(temperature=0, top_p=1, top_k=-1, min_p=1.0, seed=-(1 << 63), n=128, logprobs=20, stop=["x"] * 64)
    SamplingParams(max_tokens=0, prompt_logprobs=0)
    SamplingParams(max_tokens=None, min_tokens=10**6)
    assert SamplingParams(stop="a").stop_strings == ("a",)
    assert SamplingParams(logit_bias={"7": 1}).logit_bias == {7: 1.0}  # type: ignore[dict-item]
    assert SamplingParams(temperature=9e-6).greedy and not SamplingParams(temperature=1e-5).greedy


def test_token_ids_beyond_the_vocabulary() -> None:
    for params in (
        SamplingParams(logit_bias={100: 1}),
        SamplingParams(stop_token_ids=[100]),
        SamplingParams(allowed_token_ids=[100]),
    ):
        params.check_vocab(101)
        with pytest.raises(XllmError) as caught:
            params.check_vocab(100)
        assert caught.value.kind == "request" and "100" in caught.value.message


def test_stop_strings_need_text() -> None:
    with pytest.raises(XllmError):
        SamplingParams(stop="a", detokenize=False)


def test_defaults_are_those_of_vllm() -> None:
    p = SamplingParams()
    assert (p.n, p.temperature, p.top_p, p.top_k, p.min_p, p.max_tokens, p.min_tokens) == (1, 1.0, 1.0, 0, 0.0, 16, 0)
    assert (p.presence_penalty, p.frequency_penalty, p.repetition_penalty) == (0.0, 0.0, 1.0)
    assert p.seed is None and p.logprobs is None and p.prompt_logprobs is None and not p.ignore_eos
