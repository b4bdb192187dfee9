"""Embeddings on the toy executor: what is pooled, whatever else runs, is preempted or is cut."""

from __future__ import annotations

import numpy as np
import pytest
from fake_executor import VOCAB, Run, make_facts, toy_greedy, toy_row
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm_compiler.errors import XllmError
from xllm_compiler.runtime.outputs import Output
from xllm_compiler.runtime.pooling import Pooler, PoolingParams
from xllm_compiler.runtime.request import Request
from xllm_compiler.runtime.sampling_params import SamplingParams
from xllm_compiler.step.interface import Pooling


def expected(prompt: list[int], pooling: Pooling, size: int | None = None) -> np.ndarray:
    """By the toy's rule alone."""
    rows = np.array([toy_row(prompt[: p + 1]) for p in range(len(prompt))], np.float64)
    vector = {"last": rows[-1], "mean": rows.mean(0), "cls": rows[0]}[pooling.kind][:size]
    return vector / np.linalg.norm(vector) if pooling.normalize else vector


def run_all(run: Run, asked: list[tuple[list[int], PoolingParams | SamplingParams]]) -> list[list[Output]]:
    """Events of each request."""
    got: dict[str, list[Output]] = {}
    for i, (prompt, params) in enumerate(asked):
        got[str(i)] = []
        run.engine.submit(Request(str(i), prompt, params), run.events.put)
    for _ in range(4000):
        if not run.engine.health().busy:
            break
        run.engine.step()
    while not run.events.empty():
        event = run.events.get()
        got[event.request_id].append(event)
    return list(got.values())


@settings(max_examples=60, deadline=None)
@given(
    jobs=st.lists(st.tuples(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=30), st.booleans()), max_size=7),
    kind=st.sampled_from(["last", "mean", "cls"]),
    normalize=st.booleans(),
    pages=st.integers(9, 20),
    tokens=st.integers(4, 16),
    rows=st.integers(1, 8),
)
def test_neighbours_chunks_and_preemption_change_no_bit(
    jobs: list[tuple[list[int], bool]], kind: str, normalize: bool, pages: int, tokens: int, rows: int
) -> None:
    pooling = Pooling(kind, normalize, None)
    facts = make_facts(pooling=pooling, max_num_batched_tokens=tokens, max_num_logits=rows)
    chat = SamplingParams(temperature=0, max_tokens=6)
    run = Run(facts, pages=pages, start=False)
    asked = [(prompt, chat if text else PoolingParams()) for prompt, text in jobs]
    for (prompt, params), events in zip(asked, run_all(run, asked), strict=True):
        if params is chat:
            assert [t for e in events for t in e.token_ids] == toy_greedy(prompt, 6)
            continue
        (event,) = events
        assert event.finished and event.finish_reason == "stop" and event.embedding is not None
        np.testing.assert_allclose(event.embedding, expected(prompt, pooling), rtol=1e-5, atol=1e-6)
        alone = run_all(Run(make_facts(pooling=pooling, max_num_batched_tokens=64), start=False), [(prompt, params)])
        assert alone[0][0].embedding is not None
        assert alone[0][0].embedding.tobytes() == event.embedding.tobytes()
    assert run.engine.loop.pool.used == 0
    run.engine.stop()


@pytest.mark.parametrize("kind", ["last", "mean"])
def test_a_preempted_prompt_is_pooled_once(kind: str) -> None:
    """Two answers grow into the pages of a prompt that is half computed, whose rows are computed again."""
    pooling = Pooling(kind, False, None)
    facts = make_facts(pooling=pooling, max_num_batched_tokens=4)
    run = Run(facts, pages=12, start=False)
    chat, prompt = SamplingParams(temperature=0, max_tokens=16), list(range(30))
    *_, (event,) = run_all(run, [([1, 2, 3], chat), ([4, 5, 6], chat), (prompt, PoolingParams())])
    assert event.metrics is not None and event.metrics.preemptions > 0 and event.embedding is not None
    np.testing.assert_allclose(event.embedding, expected(prompt, pooling), rtol=1e-6)
    run.engine.stop()


def test_steps_take_turns() -> None:
    """A long answer does not hold up embeddings, nor do many embeddings hold up an answer."""
    run = Run(make_facts(pooling=Pooling("last", True, None), max_num_batched_tokens=8), start=False)
    functions = []
    execute = run.executor.execute
    run.executor.execute = lambda batch: (functions.append(batch.function), execute(batch))[1]  # type: ignore[method-assign]
    chat = SamplingParams(temperature=0, max_tokens=8)
    asked = [([1, 2, 3], chat), *[([5] * 20, PoolingParams()) for _ in range(4)]]
    run_all(run, asked)
    assert functions[:16] == ["embed", "step"] * 8 or functions[:16] == ["step", "embed"] * 8
    run.engine.stop()


def test_what_is_not_finite_is_told() -> None:
    run = Run(make_facts(pooling=Pooling("mean", False, None)), start=False)
    run.executor.nan_next = True
    (event,) = run_all(run, [([1, 2, 3], PoolingParams())])[0]
    assert event.finish_reason == "error" and event.error is not None and "not finite" in event.error.message
    run.engine.stop()


def test_a_model_without_embeddings_refuses() -> None:
    run = Run(make_facts(), start=False)
    with pytest.raises(XllmError, match="no function embed; it has step"):
        run.engine.submit(Request("a", [1], PoolingParams()), run.events.put)
    run.engine.stop()


@pytest.mark.parametrize("normalize", [True, False])
def test_sums_are_token_by_token(normalize: bool) -> None:
    """Rows in any pieces, and numbers that another order would add up differently."""
    rows = np.random.default_rng(0).standard_normal((300, 24)).astype(np.float32)
    rows *= np.float32(10) ** np.random.default_rng(1).integers(-8, 8, (300, 1)).astype(np.float32)
    found = set()
    for piece in (1, 7, 128, 300):
        pooler = Pooler(Pooling("mean", normalize, None), None)
        for start in range(0, 300, piece):
            pooler.add(rows[start : start + piece])
        found.add(pooler.result().tobytes())
    assert len(found) == 1
    total = np.zeros(24)
    for row in rows:
        total += row
    mean = total / 300
    want = mean / np.sqrt((mean * mean).sum()) if normalize else mean
    np.testing.assert_allclose(np.frombuffer(found.pop(), np.float32), want, rtol=1e-6)
