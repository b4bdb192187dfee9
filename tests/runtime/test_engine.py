"""The engine on the toy executor: what clients see, and that nothing a request does hurts another."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest
from fake_executor import VOCAB, FakeExecutor, Run, error_of, make_facts, toy_greedy, toy_row

from xllm_compiler.errors import XllmError
from xllm_compiler.runtime.engine import Engine
from xllm_compiler.runtime.outputs import Output
from xllm_compiler.runtime.request import Request
from xllm_compiler.runtime.sampling_params import SamplingParams

PROMPT = [5, 6, 7]
GREEDY = SamplingParams(temperature=0, max_tokens=12)


def test_greedy_tokens_times_and_finish() -> None:
    with Run() as run:
        out = run.generate(PROMPT, GREEDY)
    sequence = out.outputs[0]
    assert sequence.token_ids == toy_greedy(PROMPT, 12) and sequence.finish_reason == "length"
    assert sequence.logprobs is None and sequence.cumulative_logprob is None and out.prompt_logprobs is None
    m = out.metrics
    assert m is not None and 0 < m.arrival <= m.first_scheduled <= m.first_token <= m.last_token <= m.finished
    assert run.executor.closed


@pytest.mark.parametrize("chunk", [1, 2, 7, 64])
def test_chunked_prompts_give_the_same_tokens(chunk: int) -> None:
    prompt = [(i * 31) % VOCAB for i in range(40)]
    model_info = make_facts(max_num_batched_tokens=chunk, max_num_seqs=1, max_num_logits=1)
    with Run(model_info) as run:
        assert run.generate(prompt, GREEDY).outputs[0].token_ids == toy_greedy(prompt, 12)
        assert max(n for n, _, _ in run.executor.step_sizes) == min(chunk, 40)


def test_many_at_once_under_memory_pressure_answer_as_if_alone() -> None:
    rng = np.random.default_rng(0)
    wanted: dict[str, tuple[list[int], SamplingParams]] = {}
    with Run(make_facts(max_num_seqs=6, max_num_batched_tokens=11), pages=17) as run:
        for i in range(40):
            prompt = rng.integers(0, VOCAB, int(rng.integers(1, 40))).tolist()
            params = SamplingParams(temperature=float(i % 3) / 2, max_tokens=int(rng.integers(1, 20)), seed=i)
            wanted[run.submit(prompt, params)] = (prompt, params)
        results = run.collect(wanted)
        stats = run.engine.stats()
        assert stats.preemptions > 0, "the test means to preempt"
        assert stats.recomputed_tokens > 0 and stats.kv_pages_used == 0 and stats.running == stats.waiting == 0
        assert stats.prompt_tokens == sum(len(p) for p, _ in wanted.values())
        assert stats.generation_tokens == sum(len(r.outputs[0].token_ids) for r in results.values())
        assert stats.finished == {"stop": 0, "length": 40, "abort": 0, "error": 0}
    for name, (prompt, params) in wanted.items():
        with Run(pages=64) as alone:
            assert results[name].outputs[0].token_ids == alone.generate(prompt, params).outputs[0].token_ids


def test_siblings_differ_and_repeat() -> None:
    params = SamplingParams(n=4, seed=7, max_tokens=8)
    with Run() as run:
        first, second = run.generate(PROMPT, params), run.generate(PROMPT, params)
        unseeded = [run.generate(PROMPT, SamplingParams(max_tokens=8)).outputs[0].token_ids for _ in range(3)]
    tokens = [tuple(c.token_ids) for c in first.outputs]
    assert len(set(tokens)) == 4 and [c.index for c in first.outputs] == [0, 1, 2, 3]
    assert tokens == [tuple(c.token_ids) for c in second.outputs]
    assert len({tuple(t) for t in unseeded}) == 3


def test_stop_tokens_and_end_of_text() -> None:
    answer = toy_greedy(PROMPT, 12)
    at = next(i for i in range(3, 12) if answer[i] not in answer[:i])
    with Run(make_facts(eos=(answer[at],))) as run:
        out = run.generate(PROMPT, GREEDY).outputs[0]
        assert out.token_ids == answer[: at + 1] and (out.finish_reason, out.stop_reason) == ("stop", None)
        ignored = run.generate(PROMPT, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)).outputs[0]
        assert ignored.token_ids == answer and ignored.finish_reason == "length"
        later = run.generate(PROMPT, SamplingParams(temperature=0, max_tokens=12, min_tokens=at + 2)).outputs[0]
        assert later.token_ids[:at] == answer[:at] and later.token_ids[at] != answer[at]
    with Run() as run:
        params = SamplingParams(temperature=0, max_tokens=12, stop_token_ids=[answer[at]])
        out = run.generate(PROMPT, params).outputs[0]
        assert out.token_ids == answer[: at + 1] and (out.finish_reason, out.stop_reason) == ("stop", answer[at])


def log_softmax(row: np.ndarray[Any, np.dtype[np.float32]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    wide = row.astype(np.float64)
    return wide - wide.max() - np.log(np.exp(wide - wide.max()).sum())


@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize("chunk", [4, 5, 64])
def test_prompt_logprobs_come_once_and_are_right_however_chunked(rows: int, chunk: int) -> None:
    prompt = [(i * 7) % VOCAB for i in range(23)]
    params = SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=2, logprobs=1)
    model_info = make_facts(max_num_logits=rows, max_num_batched_tokens=chunk)
    with Run(model_info) as run:
        other = run.submit([9] * 20, SamplingParams(temperature=0, max_tokens=30))
        name = run.submit(prompt, params)
        events: list[Output] = []
        while not (events and any(e.request_id == name and e.finished for e in events)):
            events.append(run.events.get(timeout=10))
        assert other
    mine = [e for e in events if e.request_id == name]
    given = [e.prompt_logprobs for e in mine if e.prompt_logprobs is not None]
    assert len(given) == 1 and given[0][0] is None and len(given[0]) == len(prompt)
    for position, entry in enumerate(given[0][1:], 1):
        expected = log_softmax(toy_row(prompt[:position]))
        assert entry is not None and next(iter(entry)) == prompt[position]
        for token, item in entry.items():
            assert item.logprob == pytest.approx(expected[token], abs=1e-5)
        assert set(np.argsort(-expected)[:2].tolist()) <= set(entry)
    answer = toy_greedy(prompt, 3)
    logprobs = [d for e in mine for d in e.logprobs or []]
    assert [next(iter(d)) for d in logprobs] == answer
    assert all(d[t].rank == 1 for d, t in zip(logprobs, answer, strict=True))


def test_a_prompt_that_loses_its_pages_half_way_is_scored_once() -> None:
    """One page per token: the older answer's growth takes the younger prompt's pages in the middle of its chunks."""
    model_info = make_facts(max_num_seqs=2, max_num_logits=2, page_tokens=1)
    old, young = SamplingParams(temperature=0, max_tokens=10), SamplingParams(max_tokens=1, prompt_logprobs=0)
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]
    run = Run(model_info, pages=12, start=False)
    names = [run.submit([1, 2], old), run.submit(prompt, young)]
    turn_until(run, lambda: not run.engine.health().busy)
    assert run.engine.stats().preemptions == 1
    results = run.collect(dict(zip(names, [([1, 2], old), (prompt, young)], strict=True)))
    scores = results[names[1]].prompt_logprobs
    assert scores is not None and [next(iter(entry or {})) for entry in scores[1:]] == prompt[1:]
    for position, entry in enumerate(scores[1:], 1):
        assert entry is not None
        assert entry[prompt[position]].logprob == pytest.approx(
            log_softmax(toy_row(prompt[:position]))[prompt[position]]
        )


def test_scoring_only() -> None:
    prompt = list(range(10))
    with Run() as run:
        out = run.generate(prompt, SamplingParams(max_tokens=0, prompt_logprobs=0))
        assert out.outputs[0].token_ids == [] and out.outputs[0].finish_reason == "length"
        assert out.prompt_logprobs is not None and len(out.prompt_logprobs) == 10
        # n choices report the prompt once.
        out = run.generate(prompt, SamplingParams(n=3, max_tokens=2, prompt_logprobs=0))
        assert out.prompt_logprobs is not None and [len(c.token_ids) for c in out.outputs] == [2, 2, 2]


def test_the_length_of_the_model_ends_an_answer() -> None:
    with Run(make_facts(max_model_len=20)) as run:
        out = run.generate(PROMPT, SamplingParams(temperature=0, max_tokens=None)).outputs[0]
        assert len(out.token_ids) == 17 and out.finish_reason == "length"
        assert error_of(run, [1] * 20, GREEDY).kind == "request"
        assert len(run.generate([1] * 19, GREEDY).outputs[0].token_ids) == 1


def test_a_pool_smaller_than_the_model_is_the_limit_then() -> None:
    with Run(make_facts(max_model_len=64), pages=5) as run:
        assert run.engine.max_tokens == 20
        out = run.generate(PROMPT, SamplingParams(temperature=0, max_tokens=None)).outputs[0]
        assert out.token_ids == toy_greedy(PROMPT, 17) and out.finish_reason == "length"
        error = error_of(run, [1] * 21, GREEDY)
        assert error.kind == "request" and "KV cache" in error.message and "20" in error.message


@pytest.mark.parametrize(
    ("prompt", "params"),
    [
        ([], GREEDY),
        ([VOCAB], GREEDY),
        ([-1], GREEDY),
        ([1.5], GREEDY),
        ([1, 2.5, 3], GREEDY),
        ([1, True], GREEDY),
        (["a"], GREEDY),
        ([1, None], GREEDY),
        ([1] * 64, GREEDY),
        ([1], SamplingParams(logit_bias={VOCAB: 1})),
        ([1], SamplingParams(stop="x")),
        ([1], SamplingParams(max_tokens=None, min_tokens=64)),
    ],
    ids=str,
)
def test_what_cannot_run_is_refused_at_once(prompt: Any, params: SamplingParams) -> None:
    with Run() as run:
        with pytest.raises(XllmError) as caught:
            run.submit(prompt, params)
        assert caught.value.kind == "request"
        assert run.generate(PROMPT, GREEDY).outputs[0].token_ids == toy_greedy(PROMPT, 12)


def turn_until(run: Run, done: Any, limit: int = 500) -> None:
    for _ in range(limit):
        if done():
            return
        run.engine.step()
    raise AssertionError("it does not end")


def test_an_abort_frees_pages_before_the_next_step() -> None:
    run = Run(start=False)
    name = run.submit([1] * 30, SamplingParams(max_tokens=30, n=2))
    for _ in range(4):
        run.engine.step()
    assert run.engine.stats().kv_pages_used > 0
    steps = run.executor.steps
    run.engine.abort(name)
    run.engine.abort("nobody")
    run.engine.step()
    assert run.engine.stats().kv_pages_used == 0 and run.executor.steps == steps
    events = []
    while not run.events.empty():
        events.append(run.events.get())
    assert [e.finish_reason for e in events[-2:]] == ["abort", "abort"]
    assert [e.finished for e in events[-2:]] == [False, True]
    run.engine.step()
    assert run.events.empty() and not run.engine.health().busy


def test_an_exception_in_a_step_fails_those_in_it_only() -> None:
    model_info = make_facts(max_num_seqs=2, max_num_batched_tokens=4)
    run = Run(model_info, start=False)
    names = [run.submit([i] * 3, SamplingParams(temperature=0, max_tokens=6)) for i in range(4)]
    run.engine.step()
    run.executor.fail_next = RuntimeError("a kernel fell over")
    run.engine.step()
    outcome: dict[str, Output] = {}
    turn_until(run, lambda: not run.engine.health().busy)
    while not run.events.empty():
        event = run.events.get()
        if event.finished:
            outcome[event.request_id] = event
    reasons = [outcome[name].finish_reason for name in names]
    assert reasons.count("error") == 2 and reasons.count("length") == 2
    for name in names:
        error = outcome[name].error
        if error is not None:
            assert error.kind == "internal" and "a kernel fell over" in error.message
    assert run.engine.stats().kv_pages_used == 0


def test_logits_that_are_no_numbers_fail_one_request() -> None:
    run = Run(start=False)
    first = run.submit([1], GREEDY)
    second = run.submit([2], GREEDY)
    run.engine.step()
    run.executor.nan_next = True
    turn_until(run, lambda: not run.engine.health().busy)
    ends = {}
    while not run.events.empty():
        event = run.events.get()
        if event.finished:
            ends[event.request_id] = event
    # NaN at id 3 of the first row: found by greedy, since NaN counts as the largest.
    assert ends[first].finish_reason == "error" and ends[first].error is not None
    assert ends[first].error.kind == "internal"
    assert ends[second].finish_reason == "length"


def test_a_listener_that_raises_ends_its_own_request_only() -> None:
    with Run() as run:
        calls = []

        def bad(event: Output) -> None:
            calls.append(event)
            raise ValueError("a bug of the listener")

        run.engine.submit(Request("bad", [1, 2], SamplingParams(max_tokens=50)), bad)
        assert run.generate(PROMPT, GREEDY).outputs[0].token_ids == toy_greedy(PROMPT, 12)
        assert run.engine.drain(10)
        assert calls[-1].finish_reason == "abort" and len(calls) < 10
        assert run.engine.stats().callback_errors >= 1


def test_the_gate_opens_before_the_first_token_is_told() -> None:
    opened = threading.Event()
    with Run(before_first_output=lambda: opened.wait(10) and None) as run:
        name = run.submit(PROMPT, GREEDY)
        time.sleep(0.1)
        assert run.events.empty()
        opened.set()
        assert run.collect({name: (PROMPT, GREEDY)})[name].finished


def test_a_closed_gate_fails_everyone_and_health() -> None:
    def shut() -> None:
        raise XllmError("artifact", "weights.bin is damaged")

    with Run(before_first_output=shut) as run:
        assert error_of(run, PROMPT, GREEDY).kind == "artifact"
        health = run.engine.health()
        assert not health.alive and health.error is not None and health.error.kind == "artifact"
        with pytest.raises(XllmError) as caught:
            run.submit(PROMPT, GREEDY)
        assert caught.value.kind == "artifact"


def test_drain_finishes_what_runs_and_takes_no_more() -> None:
    with Run() as run:
        name = run.submit(PROMPT, GREEDY)
        assert run.engine.drain(10)
        with pytest.raises(XllmError) as caught:
            run.submit(PROMPT, GREEDY)
        assert caught.value.kind == "capacity"
        assert run.collect({name: (PROMPT, GREEDY)})[name].outputs[0].finish_reason == "length"


def test_drain_aborts_what_does_not_finish_in_time() -> None:
    with Run() as run:
        run.executor.hold = threading.Event()
        run.submit(PROMPT, GREEDY)
        began = time.monotonic()
        threading.Timer(0.3, run.executor.hold.set).start()
        assert not run.engine.drain(0.1)
        assert time.monotonic() - began < 5
        events = []
        while not run.events.empty():
            events.append(run.events.get())
        assert events[-1].finish_reason == "abort" and events[-1].finished


def test_stop_tells_everyone() -> None:
    run = Run()
    run.executor.hold = threading.Event()
    run.submit(PROMPT, GREEDY)
    run.submit([1], GREEDY)
    threading.Timer(0.1, run.executor.hold.set).start()
    run.engine.stop()
    run.engine.stop()
    ends = []
    while not run.events.empty():
        ends.append(run.events.get())
    assert sum(e.finished for e in ends) == 2 and not run.engine.health().alive


def test_a_full_queue_and_a_double_name_are_refused() -> None:
    run = Run(start=False, max_queued=2)
    run.engine.submit(Request("a", [1], GREEDY), run.events.put)
    with pytest.raises(XllmError) as caught:
        run.engine.submit(Request("a", [1], GREEDY), run.events.put)
    assert caught.value.kind == "request"
    run.engine.submit(Request("b", [1], GREEDY), run.events.put)
    with pytest.raises(XllmError) as caught:
        run.engine.submit(Request("c", [1], GREEDY), run.events.put)
    assert caught.value.kind == "capacity"


def test_health_sees_a_stuck_step() -> None:
    with Run() as run:
        assert run.engine.health().stalled_s == 0.0
        time.sleep(0.2)
        run.executor.hold = threading.Event()
        run.submit(PROMPT, GREEDY)
        time.sleep(0.1)
        health = run.engine.health()
        assert health.alive and health.busy and 0.05 < health.stalled_s < 0.19, "idle time does not count"
        run.executor.hold.set()
        assert run.engine.drain(10) and run.engine.health().stalled_s == 0.0


def test_submitting_from_many_threads() -> None:
    results: dict[int, list[int]] = {}
    with Run(make_facts(max_num_seqs=8, max_num_batched_tokens=32, max_num_logits=8)) as run:

        def client(i: int) -> None:
            done = threading.Event()
            tokens: list[int] = []

            def on_output(event: Output) -> None:
                tokens.extend(event.token_ids)
                if event.finished:
                    done.set()

            run.engine.submit(Request(f"t{i}", [i, i + 1], GREEDY), on_output)
            assert done.wait(20)
            results[i] = tokens

        threads = [threading.Thread(target=client, args=(i,)) for i in range(30)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == {i: toy_greedy([i, i + 1], 12) for i in range(30)}


def test_clients_are_told_during_the_next_step() -> None:
    told: list[tuple[str, int]] = []
    done = threading.Event()
    with Run() as run:

        def on_output(event: Output) -> None:
            deadline = time.monotonic() + 10
            while run.executor.steps < min(len(told) + 2, 3) and time.monotonic() < deadline:
                time.sleep(1e-3)
            time.sleep(0.05)  # more steps do not run
            told.append((threading.current_thread().name, run.executor.steps))
            if event.finished:
                done.set()

        run.engine.submit(Request("x", PROMPT, SamplingParams(temperature=0, max_tokens=4)), on_output)
        assert done.wait(30)
    assert told == [("xllm-outputs", steps) for steps in (2, 3, 4, 4)]


def test_a_listener_may_stop_the_engine() -> None:
    with Run() as run:
        run.engine.submit(Request("x", PROMPT, GREEDY), lambda event: run.engine.stop())
        run.engine.submit(Request("y", PROMPT, GREEDY), run.events.put)
        while not run.events.get(timeout=20).finished:
            pass
    assert run.executor.closed


class Letters:
    """A decoder of one letter for a token, that knows no `unknown` one."""

    def __init__(self, unknown: int) -> None:
        self.unknown = unknown

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        if self.unknown in ids:
            raise KeyError(f"token {self.unknown}")
        return "".join(chr(65 + i % 26) for i in ids)


@pytest.mark.parametrize("stop", [None, ["no such text"]])
@pytest.mark.parametrize("at", [0, 5, 10, 11])
def test_text_that_cannot_be_decoded_fails_its_request_only(at: int, stop: list[str] | None) -> None:
    prompt = [20, 21]
    tokens = toy_greedy(prompt, 12)
    assert tokens[at] not in [*prompt, *tokens[:at]]
    other = next([i, i + 1] for i in range(VOCAB) if tokens[at] not in [i, i + 1, *toy_greedy([i, i + 1], 12)])
    with Run(tokenizer=cast(Any, Letters(tokens[at]))) as run:
        bad = run.submit(prompt, SamplingParams(temperature=0, max_tokens=12, stop=stop))
        good = run.submit(other, SamplingParams(temperature=0, max_tokens=12, stop=stop))
        ends: dict[str, Output] = {}
        while len(ends) < 2:
            event = run.events.get(timeout=20)
            assert event.request_id not in ends, "told after its end"
            if event.finished:
                ends[event.request_id] = event
        assert run.engine.drain(10) and run.engine.stats().kv_pages_used == run.engine.stats().waiting == 0
    assert ends[good].finish_reason == "length" and ends[good].error is None
    assert ends[bad].finish_reason == "error" and ends[bad].error is not None
    assert ends[bad].error.kind == "internal" and f"token {tokens[at]}" in ends[bad].error.message


def test_a_planner_bug_fails_requests_but_not_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    from xllm_compiler.runtime import scheduler

    real = scheduler.plan
    broken = {"left": 1}

    def plan(*args: Any) -> Any:
        if broken["left"]:
            broken["left"] -= 1
            raise KeyError("a bug in the policy")
        return real(*args)

    monkeypatch.setattr(scheduler, "plan", plan)
    with Run() as run:
        assert error_of(run, PROMPT, GREEDY).kind == "internal"
        assert run.generate(PROMPT, GREEDY).outputs[0].token_ids == toy_greedy(PROMPT, 12)


def test_the_engine_adds_little_to_a_step() -> None:
    """The aim is 100 us at batch 1; ten times that is allowed here, for machines that are busy with something else."""

    class Instant(FakeExecutor):
        def execute(self, batch: Any) -> Any:
            return {"logits": self._logits[: batch.sizes["S"]]}

    model_info = make_facts(max_model_len=40960, page_tokens=16, vocab=32000)
    engine = Engine(Instant(model_info, 2560), model_info)
    done = []
    engine.submit(Request("x", [1, 2, 3], SamplingParams(temperature=0, max_tokens=300)), lambda e: done.append(e))
    began = time.process_time()
    while engine.health().busy:
        engine.step()
    assert len(done) == 300
    assert (time.process_time() - began) / 300 < 1e-3
