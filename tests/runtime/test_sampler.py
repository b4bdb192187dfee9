"""The sampler against transformers' logits processors, scipy-free statistics and brute force."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from xllm_compiler.errors import XllmError
from xllm_compiler.runtime.executor import block_maxima
from xllm_compiler.runtime.sampler import (
    RawLogprobs,
    RowSampler,
    Scratch,
    nucleus,
    pick,
    prompt_ids,
    raw_logprobs,
    top_ids,
)
from xllm_compiler.runtime.sampling_params import SamplingParams

VOCAB = 300
Row = NDArray[np.float32]


def make_row(seed: int, vocab: int = VOCAB, scale: float = 2.0) -> Row:
    return np.random.default_rng(seed).normal(0, scale, vocab).astype(np.float32)


def sampler(params: SamplingParams, **changes: Any) -> RowSampler:
    options: dict[str, Any] = {"seed": 1, "index": 0, "eos_ids": (5,), "vocab": VOCAB}
    options["prompt"] = prompt_ids(params, np.array(changes.pop("prompt", [1, 2, 2, 7])))
    options["scratch"] = Scratch(VOCAB)
    return RowSampler(params, **{**options, **changes})


def sample(s: RowSampler, row: Row, position: int, generated: int) -> tuple[int, RawLogprobs | None]:
    """As the engine asks, with the maxima of the row's blocks."""
    return s.sample(row, block_maxima({"logits": row[None]})[0], position, generated)


def draws(params: SamplingParams, row: Row, count: int) -> list[int]:
    s = sampler(params)
    return [sample(s, row, position, 0)[0] for position in range(count)]


def reference_probs(row: Row, params: SamplingParams) -> NDArray[np.float64]:
    """What transformers makes of the same settings, in vLLM's order: temperature, min-p, top-k, top-p."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    scores = torch.from_numpy(row.astype(np.float64))[None]
    empty = torch.zeros((1, 0), dtype=torch.long)
    steps: list[Any] = [transformers.TemperatureLogitsWarper(float(params.temperature))]
    if params.min_p > 0:
        steps.append(transformers.MinPLogitsWarper(params.min_p))
    if params.top_k > 0:
        steps.append(transformers.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        steps.append(transformers.TopPLogitsWarper(params.top_p))
    for step in steps:
        scores = step(empty, scores)
    return np.asarray(torch.softmax(scores, -1)[0].numpy(), np.float64)


FILTERS = [
    {},
    {"temperature": 0.3},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 9},
    {"top_p": 0.6},
    {"top_p": 0.97, "temperature": 1.7},
    {"min_p": 0.1},
    {"top_k": 20, "top_p": 0.8},
    {"top_k": 30, "top_p": 0.9, "min_p": 0.02, "temperature": 1.3},
]


@pytest.mark.parametrize("settings_", FILTERS, ids=str)
def test_draws_follow_the_distribution_of_transformers(settings_: dict[str, Any]) -> None:
    row = make_row(3)
    params = SamplingParams(seed=11, **settings_)
    probs = reference_probs(row, params)
    count = 4000
    seen = np.bincount(draws(params, row, count), minlength=VOCAB)
    assert not seen[probs == 0].any(), "a filtered token was drawn"
    # Pearson's chi-square over cells that expect at least five draws, the rest pooled; beyond six sigma is no accident.
    big = probs * count >= 5
    expected = np.append(probs[big], probs[~big].sum()) * count
    observed = np.append(seen[big], seen[~big].sum())
    expected, observed = expected[expected > 0], observed[expected > 0]
    statistic = float((((observed - expected) ** 2) / expected).sum())
    freedom = max(1, len(expected) - 1)
    assert statistic < freedom + 6 * math.sqrt(2 * freedom) + 6


@settings(max_examples=200, deadline=None)
@given(
    values=st.lists(st.sampled_from([-3.0, -1.0, 0.0, 0.5, 0.5, 2.0]), min_size=1, max_size=400),
    n=st.integers(1, 25),
)
def test_top_ids_is_a_stable_sort(values: list[float], n: int) -> None:
    row = np.array(values, np.float32)
    expected = sorted(range(len(row)), key=lambda i: (-row[i], i))[:n]
    assert top_ids(row, n).tolist() == expected


@pytest.mark.parametrize("n", [1, 2, 20, 70, 5000, 10**9])
def test_top_ids_on_a_large_vocabulary(n: int) -> None:
    row = np.round(make_row(5, 151_936), 2)  # many ties
    expected = np.lexsort((np.arange(len(row)), -row))[:n]
    assert (top_ids(row, n) == expected).all()


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([0.01, 1.0, 5.0, 40.0]), top_p=st.floats(0.01, 0.999))
def test_nucleus_is_the_shortest_prefix_with_the_mass(seed: int, scale: float, top_p: float) -> None:
    row = make_row(seed, 500, scale)
    weights = np.exp(row - row.max())
    order = np.argsort(-row, kind="stable")
    mass = np.cumsum(weights[order], dtype=np.float64)
    want = top_p * float(weights.sum(dtype=np.float64))
    got = nucleus(row, weights, top_p)
    assert set(got.tolist()) == set(order[: len(got)].tolist())
    assert mass[len(got) - 1] >= want * (1 - 1e-6)
    assert len(got) == 1 or mass[len(got) - 2] < want * (1 + 1e-6)


@settings(max_examples=300, deadline=None)
@given(
    weights=st.lists(st.sampled_from([0.0, 0.0, 1e-30, 0.25, 1.0, 3.0]), min_size=1, max_size=900).filter(any),
    u=st.one_of(st.floats(0, 1, exclude_max=True), st.just(1 - 2**-53)),
)
def test_pick_is_the_inverse_of_the_running_sum(weights: list[float], u: float) -> None:
    row = np.array(weights, np.float32)
    index = pick(np.pad(row, (0, -len(row) % 64)).reshape(-1, 64), u)
    assert row[index] > 0
    upto = np.cumsum(row, dtype=np.float64)
    slack = 1e-5 * upto[-1]
    assert upto[index] >= u * upto[-1] - slack and (index == 0 or upto[index - 1] <= u * upto[-1] + slack)


def test_penalties_agree_with_transformers_and_openai() -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    row = make_row(8)
    s = sampler(SamplingParams(temperature=0, repetition_penalty=1.7, presence_penalty=0.6, frequency_penalty=0.25))
    history = [1, 2, 2, 7]
    counts = np.zeros(VOCAB, np.float32)
    for position in range(40):
        scores = torch.from_numpy(row.copy())[None]
        penalised = transformers.RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([history]), scores)[0].numpy()
        expected = int((penalised - 0.25 * counts - 0.6 * (counts > 0)).argmax())
        token, _ = sample(s, row, position, position)
        assert token == expected
        history.append(token)
        counts[token] += 1
    assert len(set(history)) > 20  # the penalties bite: unpenalised greedy would repeat one token


def test_a_repeated_token_becomes_less_likely_whatever_the_sign() -> None:
    row = np.full(VOCAB, -50.0, np.float32)
    row[[2, 30]] = [-1.0, -1.5]  # 2 is in the prompt
    assert sample(sampler(SamplingParams(temperature=0, repetition_penalty=2.0)), row, 0, 0)[0] == 30
    row[[2, 30]] = [1.5, 1.0]
    assert sample(sampler(SamplingParams(temperature=0, repetition_penalty=2.0)), row, 0, 0)[0] == 30


def test_bias_allowed_tokens_and_minimum_length() -> None:
    row = make_row(2)
    best = int(row.argmax())
    ban = SamplingParams(temperature=0, logit_bias={best: -100, 42: 100})
    assert sample(sampler(ban), row, 0, 0)[0] == 42
    only = SamplingParams(temperature=1.0, allowed_token_ids=[3, 9], seed=0)
    assert set(draws(only, row, 60)) == {3, 9}
    eager = SamplingParams(temperature=0, min_tokens=3, max_tokens=9)
    s = sampler(eager, eos_ids=(best,))
    assert sample(s, row, 0, 0)[0] != best and sample(s, row, 2, 2)[0] != best and sample(s, row, 3, 3)[0] == best


def test_forbidding_everything_is_the_requests_fault() -> None:
    params = SamplingParams(allowed_token_ids=[5], min_tokens=2, max_tokens=4)
    with pytest.raises(XllmError) as caught:
        sample(sampler(params), make_row(0), 0, 0)
    assert caught.value.kind == "request"


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("settings_", [{"temperature": 0}, {}, {"top_k": 5}, {"logprobs": 3}], ids=str)
def test_logits_that_are_no_numbers_are_an_error(poison: float, settings_: dict[str, Any]) -> None:
    row = make_row(1)
    row[17] = poison
    with pytest.raises(XllmError) as caught:
        sample(sampler(SamplingParams(**settings_)), row, 0, 0)
    assert caught.value.kind == "internal"


def test_minus_infinity_is_just_impossible() -> None:
    row = np.full(VOCAB, -np.inf, np.float32)
    row[[4, 6]] = 0.0
    assert set(draws(SamplingParams(seed=0), row, 50)) == {4, 6}
    assert draws(SamplingParams(temperature=0), row, 1) == [4]


@pytest.mark.parametrize("temperature", [1e-5, 1e-4, 100.0])
def test_extreme_temperatures_stay_finite(temperature: float) -> None:
    row = make_row(4, scale=30.0)
    tokens = draws(SamplingParams(temperature=temperature, seed=3), row, 50)
    if temperature < 1:
        assert set(tokens) == {int(row.argmax())}
    else:
        assert len(set(tokens)) > 20


def test_the_draw_depends_on_seed_choice_and_position_only() -> None:
    row = make_row(6)
    base = SamplingParams(seed=123)

    def stream(s: RowSampler, row: Row = row) -> list[int]:
        return [sample(s, row, position, 0)[0] for position in range(30)]

    first = stream(sampler(base))
    assert first == stream(sampler(base, seed=999)), "the request's own seed counts, not the engine's"
    assert first != stream(sampler(base, index=1))
    assert first != stream(sampler(SamplingParams(seed=124)))
    assert stream(sampler(SamplingParams(), seed=5)) != stream(sampler(SamplingParams(), seed=6))
    late = sampler(base)
    assert sample(late, row, 29, 0)[0] == first[29], "drawing depends on earlier draws"
    # The row's place in memory does not matter: a row of a batch starts at any multiple of four bytes.
    shifted = np.empty(VOCAB + 8, np.float32)
    for offset in range(8):
        shifted[offset : offset + VOCAB] = row
        assert stream(sampler(base), shifted[offset : offset + VOCAB]) == first


@pytest.mark.parametrize("n", [0, 1, 5, 20])
def test_logprobs_agree_with_torch(n: int) -> None:
    torch = pytest.importorskip("torch")
    row = make_row(9, 5000)
    logprobs = torch.log_softmax(torch.from_numpy(row.astype(np.float64)), -1)
    token = 1234
    got = raw_logprobs(row, token, n, Scratch(5000))
    assert got.tokens[0] == token
    assert got.ranks[0] == int((logprobs > logprobs[token]).sum()) + 1
    assert got.tokens[1:] == torch.topk(logprobs, n).indices.tolist()
    assert got.ranks[1:] == list(range(1, n + 1))
    np.testing.assert_allclose(got.logprobs, logprobs[torch.tensor(got.tokens)].numpy(), atol=1e-5)


def test_logprobs_are_the_models_own() -> None:
    row = make_row(9)
    plain = sample(sampler(SamplingParams(temperature=0, logprobs=2)), row, 0, 0)
    bent = sample(sampler(SamplingParams(temperature=3.0, logprobs=2, logit_bias={77: 100.0})), row, 0, 0)
    assert plain[1] is not None and bent[1] is not None and bent[0] == 77
    assert bent[1].tokens == [77, *plain[1].tokens] and bent[1].logprobs[1:] == plain[1].logprobs
    assert bent[1].logprobs[0] == raw_logprobs(row, 77, 0, Scratch(VOCAB)).logprobs[0] < plain[1].logprobs[0]


def plain_choice(row: Row, params: SamplingParams, position: int) -> int:
    """The definition: the whole row, as if nothing were known of it."""
    s = sampler(params, vocab=len(row), scratch=Scratch(len(row)))
    return int(row.argmax()) if params.greedy else s._draw(row.copy(), position)


def adversarial(draw: st.DrawFn) -> Row:
    """Few distinct values, so that ties cross blocks; rows of -inf but for some; lengths around multiples of 64."""
    vocab = draw(st.sampled_from([1, 63, 64, 65, 128, 1000, 4096, 5000, 9001]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    match draw(st.integers(0, 4)):
        case 0:
            row = rng.integers(-2, draw(st.integers(-1, 3)) + 1, vocab).astype(np.float32)
        case 1:
            row = np.full(vocab, draw(st.sampled_from([0.0, -0.0, -7.5, 1e30])), np.float32)
        case 2:
            row = np.full(vocab, -np.inf, np.float32)
            row[rng.integers(0, vocab, draw(st.integers(1, 5)))] = 3.0
        case 3:
            row = np.where(rng.random(vocab) < 0.5, np.float32(0.0), np.float32(-0.0))
        case _:
            row = rng.normal(0, draw(st.sampled_from([0.1, 3.0, 20.0])), vocab).astype(np.float32)
    return row


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_block_maxima_change_no_choice(data: st.DataObject) -> None:
    row = adversarial(data.draw)
    filters = st.fixed_dictionaries(
        {
            "temperature": st.sampled_from([0.0, 0.05, 1.0, 2.0]),
            "top_k": st.sampled_from([0, 1, 2, 5, 50]),
            "top_p": st.sampled_from([1.0, 0.9, 0.1]),
            "min_p": st.sampled_from([0.0, 0.05, 0.9]),
        }
    )
    params = SamplingParams(seed=data.draw(st.integers(0, 9)), **data.draw(filters))
    position = data.draw(st.integers(0, 100))
    s = sampler(params, vocab=len(row), scratch=Scratch(len(row)))
    assert sample(s, row, position, 0) == (plain_choice(row, params, position), None)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_value_that_is_no_number_is_found_wherever_it_is(data: st.DataObject) -> None:
    row = adversarial(data.draw)
    row[data.draw(st.integers(0, len(row) - 1))] = data.draw(st.sampled_from([np.nan, np.inf]))
    for setting in ({"temperature": 0}, {"top_k": 3}, {"min_p": 0.1}, {"logprobs": 1}, {"logit_bias": {0: 1.0}}):
        s = sampler(SamplingParams(**setting), vocab=len(row), scratch=Scratch(len(row)))
        with pytest.raises(XllmError, match="not numbers"):
            sample(s, row, 0, 0)


def test_rows_that_the_request_changes_are_looked_at_whole() -> None:
    """Their largest logit need not be in the block of the largest raw one."""
    row = np.zeros(1000, np.float32)
    row[70] = 5.0
    for setting, token in (
        ({"logit_bias": {900: 9.0}}, 900),
        ({"allowed_token_ids": [300, 400]}, 300),
        ({"min_tokens": 1, "stop_token_ids": [70]}, 0),
        ({"presence_penalty": 1.0}, 70),
    ):
        options: dict[str, Any] = {"vocab": 1000, "scratch": Scratch(1000), "eos_ids": (70,)}
        assert sample(sampler(SamplingParams(temperature=0, **setting), **options), row, 0, 0)[0] == token
