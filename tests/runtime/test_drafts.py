"""Drafts run behind decodes: an answer is the same with any of them, and right ones save steps."""

from __future__ import annotations

from typing import Any

import pytest
from fake_executor import VOCAB, Run, ToyDrafter, make_facts, toy_greedy

from xllm_compiler.runtime import sequence
from xllm_compiler.runtime.sampling_params import SamplingParams

PROMPT = [5, 6, 7]


def answer(params: SamplingParams, right: float | None, **facts: Any) -> tuple[Any, Run]:
    drafter = None if right is None else ToyDrafter(right)
    with Run(make_facts(**facts), drafter=drafter) as run:
        return run.generate(PROMPT, params), run


@pytest.mark.parametrize("right", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.0},
        {"temperature": 0.9, "seed": 3},
        {"temperature": 0.7, "seed": 3, "top_p": 0.8, "n": 2},
        {"temperature": 0.0, "repetition_penalty": 1.5, "presence_penalty": 0.4},
        {"temperature": 0.0, "logprobs": 3, "prompt_logprobs": 1},
        {"temperature": 0.0, "min_tokens": 9, "stop_token_ids": [toy_greedy(PROMPT, 5)[4]]},
    ],
    ids=str,
)
def test_an_answer_is_the_same_with_any_draft(fields: dict[str, Any], right: float) -> None:
    params = SamplingParams(max_tokens=14, **fields)
    plain, _ = answer(params, None)
    drafted, run = answer(params, right)
    assert drafted.outputs == plain.outputs and drafted.prompt_logprobs == plain.prompt_logprobs
    stats = run.engine.stats()
    assert stats.draft_tokens >= stats.accepted_draft_tokens
    if right == 0.0 and fields == {"temperature": 0.0}:
        assert stats.draft_tokens > 0 and stats.accepted_draft_tokens == 0


def test_right_drafts_save_steps_and_end_where_the_answer_does() -> None:
    params = SamplingParams(temperature=0, max_tokens=13)
    plain, slow = answer(params, None, page_tokens=16)
    drafted, fast = answer(params, 1.0, page_tokens=16)
    assert drafted.outputs == plain.outputs
    assert fast.executor.steps < slow.executor.steps / 2
    assert fast.engine.stats().generation_tokens == slow.engine.stats().generation_tokens == 13


def test_a_text_ends_inside_a_draft() -> None:
    end = toy_greedy(PROMPT, 6)[5]
    params = SamplingParams(temperature=0, max_tokens=20, stop_token_ids=[end])
    drafted, _ = answer(params, 1.0, page_tokens=16)
    tokens = toy_greedy(PROMPT, 20)
    assert drafted.outputs[0].token_ids == tokens[: tokens.index(end) + 1]
    assert drafted.outputs[0].finish_reason == "stop"


class _Wild:
    """Proposes what no vocabulary has, and more than was asked for."""

    def propose(self, of: sequence.Sequence, most: int) -> list[int]:
        known = of.span(0, of.known).tolist()
        return [*toy_greedy(known, 1), VOCAB, -1, *range(50)]


def test_what_no_vocabulary_has_is_not_run() -> None:
    with Run(drafter=_Wild()) as run:
        out = run.generate(PROMPT, SamplingParams(temperature=0, max_tokens=9))
    assert out.outputs[0].token_ids == toy_greedy(PROMPT, 9)
    assert 0 < run.engine.stats().draft_tokens == run.engine.stats().accepted_draft_tokens


def test_drafts_use_what_decodes_and_rows_leave() -> None:
    """Four sequences, six rows: every decode runs, two drafted tokens beside them."""
    params = SamplingParams(temperature=0, max_tokens=10)
    with Run(make_facts(max_num_seqs=4, max_num_logits=6), drafter=ToyDrafter(1.0)) as run:
        names = {run.submit([i, i + 1], params): ([i, i + 1], params) for i in range(4)}
        results = run.collect(names)
        assert max(s for _, _, s in run.executor.step_sizes) == 6
    for name, (prompt, _) in names.items():
        assert results[name].outputs[0].token_ids == toy_greedy(prompt, 10)
