"""A state machine over the engine: any order of submits, aborts, steps and failures, with every invariant checked after
each, and at the end every answer equal to the request run alone."""

from __future__ import annotations

from collections import defaultdict

from fake_executor import VOCAB, Run, ToyDrafter, make_facts, toy_greedy
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from xllm_compiler.runtime.outputs import Output
from xllm_compiler.runtime.sampling_params import SamplingParams


class EngineMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.run: Run
        self.asked: dict[str, tuple[list[int], SamplingParams]] = {}
        self.got: dict[str, dict[int, list[Output]]] = defaultdict(lambda: defaultdict(list))
        self.aborted: set[str] = set()
        self.failed_steps = 0

    @initialize(
        pages=st.integers(4, 20),
        seqs=st.integers(1, 4),
        extra=st.integers(0, 10),
        rows=st.integers(1, 6),
        page_tokens=st.integers(1, 5),
        right=st.sampled_from([None, 0.0, 0.6, 1.0]),
    )
    def begin(self, pages: int, seqs: int, extra: int, rows: int, page_tokens: int, right: float | None) -> None:
        model_info = make_facts(
            max_model_len=40,
            max_num_seqs=seqs,
            max_num_batched_tokens=seqs + extra,
            max_num_logits=rows,
            page_tokens=page_tokens,
        )
        drafter = None if right is None else ToyDrafter(right)
        self.run = Run(model_info, pages=pages, start=False, drafter=drafter)
        self.longest = self.run.engine.max_tokens

    @precondition(lambda self: self.longest >= 2)
    @rule(
        prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=39),
        more=st.integers(1, 20),
        n=st.integers(1, 2),
        scored=st.booleans(),
    )
    def submit(self, prompt: list[int], more: int, n: int, scored: bool) -> None:
        prompt = prompt[: self.longest - 1]
        params = SamplingParams(temperature=0, max_tokens=more, n=n, prompt_logprobs=0 if scored else None)
        self.asked[self.run.submit(prompt, params)] = (prompt, params)

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.asked)))
        self.run.engine.abort(name)
        self.aborted.add(name)

    @rule(times=st.integers(1, 12))
    def step(self, times: int) -> None:
        for _ in range(times):
            busy = self.run.engine.health().busy
            before = self.signature()
            self.run.engine.step()
            if busy:
                assert self.signature() != before, "requests are queued and nothing moved"
            self.check()

    @rule()
    def failing_step(self) -> None:
        self.run.executor.fail_next = RuntimeError("told to")
        self.run.engine.step()
        if self.run.executor.fail_next is None:
            self.failed_steps += 1
        self.run.executor.fail_next = None

    def signature(self) -> tuple[object, ...]:
        engine = self.run.engine
        stats = engine.stats()
        jobs = [*engine.loop.running, *engine.loop.waiting]
        return (tuple((c.serial, c.known, c.computed) for c in jobs), stats.finished, len(engine._state.inbox))

    @invariant()
    def check(self) -> None:
        if not hasattr(self, "run"):
            return
        engine = self.run.engine
        held: list[int] = []
        for sequence in engine.loop.running:
            assert sequence.table.count == -(-sequence.computed // engine.model_info.page_tokens)
            assert all(engine.loop.pool.owner(page) == sequence.serial for page in sequence.table.pages)
            held += sequence.table.pages
        for sequence in engine.loop.waiting:
            assert sequence.table.count == 0 and sequence.computed == 0
        assert len(set(held)) == len(held) == engine.loop.pool.used == engine.stats().kv_pages_used
        serials = [c.serial for c in [*engine.loop.running, *engine.loop.waiting]]
        assert serials == sorted(serials)
        assert len(engine.loop.running) <= engine.loop.limits.seqs
        self.read_events()

    def read_events(self) -> None:
        while not self.run.events.empty():
            event = self.run.events.get()
            events = self.got[event.request_id][event.index]
            assert not events or events[-1].finish_reason is None, "an event after the last one"
            events.append(event)
            prompt, params = self.asked[event.request_id]
            tokens = [t for e in events for t in e.token_ids]
            count = min(params.max_tokens or 0, self.longest - len(prompt))
            assert tokens == toy_greedy(prompt, count)[: len(tokens)], "the answer depends on the neighbours"

    def teardown(self) -> None:
        if not hasattr(self, "run"):
            return
        for _ in range(3000):
            if not self.run.engine.health().busy:
                break
            self.run.engine.step()
            self.check()
        self.read_events()
        engine = self.run.engine
        assert not engine.health().busy and engine.loop.pool.used == 0 and not engine.loop.groups
        errors = 0
        for name, (prompt, params) in self.asked.items():
            choices = self.got[name]
            assert sorted(choices) == list(range(params.n))
            last = [choices[i][-1] for i in range(params.n)]
            assert all(e.finish_reason is not None for e in last) and sum(e.finished for e in last) == 1
            for index, events in choices.items():
                reason = events[-1].finish_reason
                errors += reason == "error"
                if reason == "length":
                    count = min(params.max_tokens or 0, self.longest - len(prompt))
                    assert [t for e in events for t in e.token_ids] == toy_greedy(prompt, count)
                    if params.prompt_logprobs is not None and index == 0:
                        scores = [e.prompt_logprobs for e in events if e.prompt_logprobs is not None]
                        assert len(scores) == 1 and len(scores[0]) == len(prompt)
                else:
                    assert reason == "error" or (reason == "abort" and name in self.aborted)
        assert errors <= self.failed_steps * engine.loop.limits.seqs
        engine.stop()


EngineMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
TestEngineMachine = EngineMachine.TestCase
