"""The simulated schedule: streams in order, events and collectives honoured."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_text import TWO_STREAMS, model_text

from xllm_compiler.analysis.cost import Costs
from xllm_compiler.analysis.happens_before import HappensBefore, done
from xllm_compiler.analysis.machine import Machine
from xllm_compiler.analysis.simulate import WAITS, Slot, makespan, simulate, streams_of
from xllm_compiler.ir.core import Module
from xllm_compiler.ir.parser import parse_module
from xllm_compiler.passes.manager import run_pipeline
from xllm_compiler.report.sizes import complete
from xllm_compiler.testing.graphs import random_module

MACHINE = Machine("m", flops=1e9, bandwidth=1e9, launch=1e-6, link=1e9, hop=1e-6)


def scheduled(text: str, pipeline: str) -> Module:
    module = parse_module(text, "m.xir")
    run_pipeline(pipeline, module)
    return module


def by_result(slots: list[Slot]) -> dict[str, Slot]:
    return {s.op.results[0].name: s for s in slots if s.op.results}


def test_one_stream_runs_back_to_back() -> None:
    func = parse_module(model_text(2), "m.xir").func()
    dims = {"N": 4, "B": 4, "S": 4, "P": 40, "context": 30}
    slots = simulate(func, dims, MACHINE)
    assert streams_of(slots) == ["stream 0"]
    assert [s.op for s in slots] == [op for op, cost in Costs(func).of.items() if not cost.free]
    assert slots[0].start == 0 and all(a.end == b.start for a, b in pairwise(slots))
    assert makespan(slots) == pytest.approx(Costs(func).seconds(dims, MACHINE))


def test_a_collective_is_in_flight_while_its_stream_goes_on() -> None:
    slots = simulate(parse_module(TWO_STREAMS, "m.xir").func(), {"N": 8}, MACHINE)
    at = by_result(slots)
    assert streams_of(slots) == ["stream 0", "link @tp"]
    assert at["f"].start == at["a"].end
    assert at["b"].start == pytest.approx(at["f"].start + MACHINE.launch) and at["b"].start < at["f"].end
    assert at["c"].start == at["b"].end and at["c"].waited_for is at["f"].op
    assert at["c"].end == max(at["b"].end, at["f"].end) == at["y"].start


def test_a_wait_for_what_is_past_takes_no_time() -> None:
    slow = Machine("m", flops=1e6, bandwidth=1e9, launch=0.0, link=1e12, hop=0.0)
    at = by_result(simulate(parse_module(TWO_STREAMS, "m.xir").func(), {"N": 8}, slow))
    assert at["f"].end < at["b"].end and at["c"].seconds == 0 and at["y"].start == at["b"].end


def test_an_event_holds_the_other_stream_back() -> None:
    module = scheduled(TWO_STREAMS, "assign-streams")
    slots = simulate(module.func(), {"N": 8}, MACHINE)
    wait = next(s for s in slots if s.op.name == "sched.wait")
    at = by_result(slots)
    assert wait.stream == "stream 1" and wait.waited_for is at["a"].op
    assert (wait.start, wait.end) == (0.0, at["a"].end) and at["f"].start == wait.end
    assert at["b"].start == at["a"].end, "stream 0 does not pay for starting a collective on stream 1"


def test_two_collectives_share_their_link() -> None:
    text = TWO_STREAMS.replace(
        '  %b = nn.linear(%z, %w) : f32[N, 256] loc("m.py":5, "model.layers.0")\n',
        "  %f2 = comm.all_reduce_start(%z, group=@tp) : !future<f32[N, 256]>\n  %b = comm.wait(%f2) : f32[N, 256]\n",
    )
    at = by_result(simulate(parse_module(text, "m.xir").func(), {"N": 8}, MACHINE))
    assert at["f2"].start == at["f"].end and at["b"].end == at["f2"].end


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_of_any_graph(seed: int) -> None:
    """On one stream or link nothing overlaps and order is kept; nothing starts before what it waits for has ended."""
    module = random_module(random.Random(seed).randrange)
    run_pipeline("assign-streams{move=true}", module)
    for func in module.funcs.values():
        slots = simulate(func, complete(module, {}), MACHINE)
        ends: dict[str, float] = {}
        slot_of = {s.op: s for s in slots}
        for s in slots:
            assert s.end >= s.start >= ends.get(s.stream, 0.0), s
            ends[s.stream] = s.end
            if s.waited_for is not None:
                assert s.end >= slot_of[s.waited_for].end
        alone = sum(s.estimate.seconds + MACHINE.launch for s in slots)
        assert max((s.estimate.seconds for s in slots), default=0.0) <= makespan(slots) <= alone


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_what_happens_before_is_over_in_time(seed: int) -> None:
    """The analysis that the verifier trusts and the simulation read the same events: no op starts before an op that it
    comes after, in every execution, has ended. A wait may stand there earlier, and ends no earlier."""
    module = random_module(random.Random(seed).randrange)
    run_pipeline("assign-streams{move=true}", module)
    for func in module.funcs.values():
        order = HappensBefore(func)
        slots = simulate(func, complete(module, {}), MACHINE)
        for a in slots:
            for b in slots:
                if a is not b and order.before(done(a.op), b.op):
                    assert a.end <= (b.end if b.op.name in WAITS else b.start), (a, b)
