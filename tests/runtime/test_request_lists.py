"""Lists that a request brings: checked and made compact once, shared by all its choices, one look per token."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm_compiler.errors import XllmError
from xllm_compiler.runtime.executor import block_maxima
from xllm_compiler.runtime.request import Request, SequenceGroup
from xllm_compiler.runtime.sampler import RowSampler, Scratch, prompt_ids
from xllm_compiler.runtime.sampling_params import SamplingParams
from xllm_compiler.runtime.stops import StopWatch, StopWords
from xllm_compiler.runtime.text import TextStream
from xllm_compiler.runtime.token_set import TokenBias, TokenSet

MANY = 1 << 20


@given(st.lists(st.integers(0, 300), max_size=60))
def test_a_token_set_is_a_set(values: list[int]) -> None:
    ours = TokenSet(values)
    assert list(ours) == sorted(set(values)) and len(ours) == len(set(values))
    assert all((token in ours) == (token in set(values)) for token in range(-3, 310))
    assert ours.largest == max(values, default=-1)


@given(st.dictionaries(st.integers(0, 300), st.floats(-100, 100, width=32), max_size=60))
def test_a_token_bias_is_a_mapping(values: dict[int, float]) -> None:
    ours = TokenBias(list(values), list(values.values()))
    assert dict(ours) == values and ours == values and list(ours) == sorted(values)
    assert all(ours.get(token) == values.get(token) for token in range(-3, 310))


@pytest.mark.parametrize("wrong", [-1, 1 << 31, 1 << 200, True, 1.5, "7", None])
def test_what_is_no_token_id_is_named(wrong: Any) -> None:
    for values in ([wrong], [1] * 1000 + [wrong], [wrong, 5, "x"]):
        with pytest.raises(ValueError) as caught:
            TokenSet(values)
        assert caught.value.args[0] is wrong
        for field in ("stop_token_ids", "allowed_token_ids"):
            with pytest.raises(XllmError) as refused:
                SamplingParams(**{field: values})
            assert refused.value.where == field and len(refused.value.message) < 200


@pytest.mark.parametrize("field", ["stop_token_ids", "allowed_token_ids", "logit_bias", "stop"])
def test_messages_about_long_lists_are_short(field: str) -> None:
    value: Any = ["x" * 10**6] * 3 if field == "stop" else [10**4000] * 3
    for wrong in (value, {10**4000: 1}, {"x" * 10**6: 1}, ["x"] * 10**6, 10**4000, "x" * 10**7):
        with pytest.raises(XllmError) as caught:
            SamplingParams(**{field: wrong})
        assert len(caught.value.message) < 300


@pytest.mark.parametrize("fields", [{"stop_token_ids": [5] * MANY}, {"allowed_token_ids": [5, 6] * (MANY // 2)}])
def test_a_long_list_costs_its_request_once(fields: dict[str, Any]) -> None:
    began = time.process_time()
    params = SamplingParams(n=128, **fields)
    params.check_vocab(10)
    group = SequenceGroup(Request("x", [1], params), lambda output: None)
    for index in range(128):
        RowSampler(params, seed=0, index=index, prompt=group.seen, eos_ids=(2,), vocab=10, scratch=Scratch(10))
    assert 5 in (params.stop_token_ids or params.allowed_token_ids or ())
    assert time.process_time() - began < 1.0  # it was fifteen seconds
    assert params.nbytes < 100


def test_lists_set_later_are_checked_before_they_are_used() -> None:
    params = SamplingParams()
    params.stop_token_ids = [3, 3, 1]
    params.logit_bias = {5: 1.0}
    params.check_vocab(10)
    assert isinstance(params.stop_token_ids, TokenSet) and list(params.stop_token_ids) == [1, 3]
    assert isinstance(params.logit_bias, TokenBias)
    params.allowed_token_ids = [10]
    with pytest.raises(XllmError):
        params.check_vocab(10)


def plain_penalties(row: Any, params: SamplingParams, prompt: Sequence[int], drawn: Sequence[int]) -> Any:
    """The penalties as vLLM's documentation has them, token by token."""
    out = row.copy()
    for token in sorted({*prompt, *drawn}):
        factor = np.float32(params.repetition_penalty)
        out[token] = out[token] / factor if out[token] > 0 else out[token] * factor
    for token in sorted(set(drawn)):
        frequency = np.float32(params.frequency_penalty) * np.float32(list(drawn).count(token))
        out[token] -= frequency + np.float32(params.presence_penalty)
    return out


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 1000), st.sampled_from([1.0, 1.3, 0.7]), st.sampled_from([0.0, 0.5]), st.sampled_from([0.0, -0.4])
)
def test_penalties_of_a_shared_prompt_give_the_same_bits(seed: int, repeat: float, often: float, once: float) -> None:
    vocab, source = 50, np.random.default_rng(seed)
    params = SamplingParams(
        temperature=0, repetition_penalty=repeat, frequency_penalty=often, presence_penalty=once, max_tokens=40
    )
    prompt = source.integers(0, vocab, 20)
    sampler = RowSampler(
        params, seed=0, index=0, prompt=prompt_ids(params, prompt), eos_ids=(), vocab=vocab, scratch=Scratch(vocab)
    )
    drawn: list[int] = []
    for step in range(30):
        row = source.normal(0, 1, vocab).astype(np.float32)
        token, _ = sampler.sample(row, block_maxima({"logits": row[None]})[0], step, step)
        assert token == int(plain_penalties(row, params, prompt.tolist(), drawn).argmax())
        drawn.append(token)


def held_by_looking(stops: Sequence[str], text: str) -> int:
    """How much of a text's end may begin a stop string, by trying all of it."""
    longest = max(map(len, stops))
    sizes = range(min(longest - 1, len(text)), 0, -1)
    return next((size for size in sizes if any(stop.startswith(text[-size:]) for stop in stops)), 0)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.text("ab", min_size=1, max_size=7), min_size=1, max_size=5),
    st.lists(st.text("abc", max_size=4), max_size=12),
)
def test_the_automaton_sees_what_looking_everywhere_sees(stops: list[str], pieces: list[str]) -> None:
    watch, text = StopWatch(StopWords(stops)), ""
    for piece in pieces:
        ended = watch.feed(piece)
        before, text = len(text), text + piece
        ends = any(text.endswith(stop, 0, end) for stop in stops for end in range(before + 1, len(text) + 1))
        assert ended == ends and watch.held == held_by_looking(stops, text)


class Characters:
    """A tokenizer in which a token is a character."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(map(chr, ids))


def stopped_text(stops: Sequence[str], text: str, include: bool, first: int) -> tuple[str, str | None]:
    """What is shown of a text, and what ended it, by searching all of it. `first`: characters that cannot stop it."""
    for end in range(first + 1, len(text) + 1):
        found = min(((text.find(s, 0, end), s) for s in stops if text.endswith(s, 0, end)), default=None)
        if found is not None:
            at = min((end - len(s), s) for s in stops if text.endswith(s, 0, end))
            return (text[: at[0] + len(at[1])] if include else text[: at[0]]), at[1]
    return text, None


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4), st.text("abc", max_size=25), st.booleans()
)
def test_a_stream_stops_where_a_search_of_the_whole_text_says(stops: list[str], text: str, include: bool) -> None:
    stream, shown = TextStream(Characters(), [], stops=stops, include_stop=include), ""
    for char in text:
        shown += stream.push(ord(char))
        if stream.stopped_by is not None:
            break
    assert (shown + stream.finish(), stream.stopped_by) == stopped_text(stops, text, include, 0)


@pytest.mark.parametrize("char", ["a", "ab", "aab"])
def test_long_stop_strings_cost_little_for_each_character(char: str) -> None:
    stops = StopWords([(char * 1024)[: 1023 - i] + "!" for i in range(64)])
    stream = TextStream(Characters(), [], stops=stops)
    text = (char * 2000)[:2000]
    began = time.process_time()
    shown = "".join(stream.push(ord(c)) for c in text) + stream.finish()
    assert shown == text and time.process_time() - began < 3.0  # it was minutes


def test_choices_share_what_their_request_lists() -> None:
    source = random.Random(0)
    params = SamplingParams(
        n=128,
        stop_token_ids=source.sample(range(10**5), 5 * 10**4),
        logit_bias={token: 1.0 for token in range(10**5)},
        stop=["x" * 1000] * 64,
    )
    group = SequenceGroup(Request("x", list(range(1000)), params), lambda output: None)
    samplers = [
        RowSampler(params, seed=0, index=i, prompt=group.seen, eos_ids=(), vocab=10**5, scratch=Scratch(8))
        for i in range(2)
    ]
    assert samplers[0]._stop[1] is samplers[1]._stop[1] and samplers[0]._bias is samplers[1]._bias
    assert group.prompt.nbytes == 4000 and params.nbytes < 2 * 10**6
