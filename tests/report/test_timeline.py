"""Timelines against the Trace Event Format: every field that its readers need, and the numbers of the schedule.

These checks are of the format's document; test_browser.py has a real reader read a timeline, Chromium's trace viewer.
Perfetto's own is fetched from the network when it is first used, which tests must not do.
"""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_text import TWO_STREAMS, model_text
from watched import Ran, run_watched

from xllm_compiler.analysis.simulate import makespan, simulate
from xllm_compiler.errors import XllmError
from xllm_compiler.ir.parser import parse_module
from xllm_compiler.passes.manager import run_pipeline
from xllm_compiler.report.data import memory_data
from xllm_compiler.report.sizes import scenarios
from xllm_compiler.report.timeline import TimelineFile, trace, write_timeline
from xllm_compiler.targets.cpu import Cpu
from xllm_compiler.testing.graphs import random_module

CPU = Cpu.machine
NUMBER = (int, float)


def check_format(data: dict[str, Any]) -> None:
    """AssertionError unless `data` is a JSON object form of the Trace Event Format, in the parts that we use."""
    data = json.loads(json.dumps(data, allow_nan=False))
    assert set(data) == {"traceEvents", "displayTimeUnit", "otherData"} and data["displayTimeUnit"] in ("ms", "ns")
    named: dict[str, set[tuple[int, int]]] = {"process_name": set(), "thread_name": set()}
    slices: dict[tuple[int, int], list[tuple[float, float]]] = {}
    flows: dict[tuple[int, int], list[dict[str, Any]]] = {}
    time, timed = 0.0, False
    for e in data["traceEvents"]:
        assert isinstance(e["name"], str) and e["name"], e
        assert type(e["pid"]) is int and type(e["tid"]) is int, e
        assert isinstance(e.get("args", {}), dict), e
        if e["ph"] == "M":
            assert not timed, "metadata first"
            key = "sort_index" if e["name"].endswith("sort_index") else "name"
            assert e["name"] in ("process_name", "process_sort_index", "thread_name", "thread_sort_index"), e
            assert isinstance(e["args"][key], int if key == "sort_index" else str), e
            named.get(e["name"], set()).add((e["pid"], e["tid"]))
            continue
        timed = True
        assert type(e["ts"]) in NUMBER and e["ts"] >= time, f"not sorted: {e}"
        assert isinstance(e["cat"], str), e
        time = e["ts"]
        assert (e["pid"], 0) in named["process_name"], e
        match e["ph"]:
            case "X":
                assert type(e["dur"]) in NUMBER and e["dur"] >= 0, e
                assert (e["pid"], e["tid"]) in named["thread_name"], e
                slices.setdefault((e["pid"], e["tid"]), []).append((e["ts"], e["ts"] + e["dur"]))
            case "C":
                assert e["args"] and all(type(v) in NUMBER for v in e["args"].values()), e
            case "s" | "f":
                assert type(e["id"]) is int, e
                flows.setdefault((e["pid"], e["id"]), []).append(e)
            case other:
                raise AssertionError(f"phase {other!r} is not one of ours")
    for spans in slices.values():
        for (_, end), (start, _) in pairwise(spans):
            assert start >= end - 0.0011, "slices of one thread overlap by more than rounding"
    for pair in flows.values():
        assert [e["ph"] for e in pair] == ["s", "f"], pair
        assert pair[1]["bp"] == "e", pair
        for e in pair:
            inside = [a < e["ts"] < b for a, b in slices[e["pid"], e["tid"]]]
            assert inside.count(True) == 1, f"a flow that binds to nothing, or to one of two: {e}"


def events(data: dict[str, Any], phase: str) -> list[dict[str, Any]]:
    return [e for e in data["traceEvents"] if e["ph"] == phase]


def test_a_planned_model(ran: Ran) -> None:
    data = trace(ran.module, CPU)
    check_format(data)
    step = scenarios(ran.module)[0]
    slots = simulate(ran.module.func(), step.dims, CPU)
    bars = events(data, "X")
    assert len(bars) == len(slots) > 20
    assert max(e["ts"] + e["dur"] for e in bars) == pytest.approx(makespan(slots) * 1e6, abs=0.01)
    first = bars[0]
    assert first["name"] == "nn.embedding %x0" and first["args"]["source"] == "model.embed (modeling_tiny.py:6)"
    glu = next(e["args"] for e in bars if e["args"]["op"] == "nn.linear_glu")
    assert glu["lineage"] == "fuse-glu/gated-product" and glu["limit"] == "memory"
    assert glu["bytes"] == 2 * (64 + 160 + 320 * 64) and glu["flops"] == 2 * 64 * 320 + 2 * 160
    assert data["otherData"] == {
        "machine": "cpu",
        "sizes": "N=1, B=1, S=1, P=33, context=512",
        "times": "estimates of the cost model",
    }


def test_the_counter_has_the_peak_of_the_memory_plan_and_ends_at_nothing(ran: Ran) -> None:
    data = trace(ran.module, CPU)
    counts = [e["args"]["bytes"] for e in events(data, "C")]
    memory = memory_data(ran.module.func(), scenarios(ran.module))
    assert memory is not None and max(counts) == memory["at"][0]["peak"] > 0
    assert counts[-1] == 0 and min(counts) == 0


def test_streams_flows_and_links() -> None:
    ran = run_watched(TWO_STREAMS, "assign-streams,plan-memory")
    data = trace(ran.module, CPU, {"N": 64})
    check_format(data)
    threads = [e["args"]["name"] for e in data["traceEvents"] if e["name"] == "thread_name"]
    assert threads == ["stream 0", "stream 1", "link @tp"]
    process = next(e["args"]["name"] for e in data["traceEvents"] if e["name"] == "process_name")
    assert process == "@step, one of 4 equal ranks"
    starts, ends = events(data, "s"), events(data, "f")
    assert [threads[e["tid"] - 1] for e in starts] == ["stream 0", "link @tp"]
    assert [threads[e["tid"] - 1] for e in ends] == ["stream 1", "stream 0"]


def test_without_a_plan_there_is_no_counter() -> None:
    data = trace(parse_module(model_text(1), "m.xir"), CPU)
    check_format(data)
    assert not events(data, "C") and events(data, "X")


def test_the_file(tmp_path: Path, ran: Ran) -> None:
    write_timeline(tmp_path / "a.json", ran.module, CPU)
    write_timeline(tmp_path / "b.json", ran.module, CPU)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert json.loads((tmp_path / "a.json").read_text()) == trace(ran.module, CPU)
    with pytest.raises(XllmError, match="cannot write: No such file or directory"):
        write_timeline(tmp_path / "none" / "a.json", ran.module, CPU)


def test_as_an_instrument(tmp_path: Path) -> None:
    module = parse_module(model_text(1), "m.xir")
    run_pipeline("fuse-glu,dce", module, instruments=[TimelineFile(tmp_path / "t.json", CPU, dims={"N": 5})])
    written = json.loads((tmp_path / "t.json").read_text())
    assert written == trace(module, CPU, {"N": 5}) and "N=5, B=1, S=1" in written["otherData"]["sizes"]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_of_any_graph(seed: int) -> None:
    module = random_module(random.Random(seed).randrange, size=5)
    run_pipeline("assign-streams,plan-memory", module)
    check_format(trace(module, CPU))
