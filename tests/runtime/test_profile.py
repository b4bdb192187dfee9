"""Profiles of a compiled model: bits as without, times that add up, the compiler's costs, a sound trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xllm_compiler.analysis.cost import Costs
from xllm_compiler.artifact import read_calls, read_manifest
from xllm_compiler.dims import parse_dim
from xllm_compiler.driver import compile_checkpoint
from xllm_compiler.errors import XllmError
from xllm_compiler.ir.parser import parse_module
from xllm_compiler.options import CompileOptions
from xllm_compiler.runtime.phases import Phases
from xllm_compiler.runtime.profile.profiler import Profiler
from xllm_compiler.runtime.profile.table import Peaks, show
from xllm_compiler.runtime.request import Request
from xllm_compiler.runtime.sampling_params import SamplingParams
from xllm_compiler.runtime.startup import EngineOptions, prepare_engine

BUNDLED = Path(__file__).resolve().parents[2] / "models" / "bundled"
STEPS = 4
POOL = 64 << 20


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("profiled") / "artifact"
    compile_checkpoint(BUNDLED, out, CompileOptions())
    return out


def serve(artifact: Path, profiler: Profiler | None) -> list[tuple[int, list[tuple[int, float]]]]:
    """Tokens and their top logprobs of some requests, run one after the other and then together."""
    options = EngineOptions(threads=2, kv_cache_memory_bytes=POOL)
    engine = prepare_engine(artifact, options, Phases(), profiler).engine
    seen: list[Any] = []
    for round_ in range(STEPS + 2):
        for i in range(1 + round_ % 2):
            ids = [(7 * k + round_) % 200 + 1 for k in range(20 + i)]
            params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, logprobs=2)
            engine.submit(Request(f"{round_}-{i}", ids, params), seen.append)
        while engine.stats().running or engine.stats().waiting:
            engine.step()
    engine.stop()
    return [(event.token_ids, repr(event.logprobs)) for event in seen]


@pytest.fixture(scope="module")
def profiled(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Profiler, list[str], Path, Any]:
    trace, told = tmp_path_factory.mktemp("trace") / "t.json", list[str]()
    profiler = Profiler(STEPS, told.append, trace=trace, peaks=Peaks(1e10, 1e11, 2e11, 5e10))
    return profiler, told, trace, serve(artifact, profiler)


def test_profiling_changes_no_bit(artifact: Path, profiled: Any) -> None:
    assert profiled[3] == serve(artifact, None)
    assert profiled[3], "something was answered"


def test_the_table_adds_up_and_counts_every_call(artifact: Path, profiled: Any) -> None:
    profiler, told = profiled[0], profiled[1]
    table = read_calls(artifact, read_manifest(artifact))
    assert sorted({p.kind for p in profiler.found}) == ["decode", "prefill"]
    for profile in profiler.found:
        calls = table.programs[profile.program]
        assert sum(row.calls for row in profile.rows) == len(calls.kernels)
        parts = sum(row.seconds for row in profile.rows) + profile.start
        assert parts == pytest.approx(profile.native, rel=1e-6)
        assert 0 < profile.native <= min(sorted(profile.steps)[profile.used - 1 :]) and profile.call > 0
        assert all(0 <= row.waiting <= row.seconds + 1e-9 for row in profile.rows)
        assert profile.recorded == sum(p.recorded for p in profiler.found if p.kind == profile.kind) == STEPS
        assert {"schedule", "prepare", "sample"} <= set(profile.host) and "execute" not in profile.host
        text = show(profile)
        assert all(row.kernel in text for row in profile.rows) and any(text in t for t in told)
        for row in profile.rows:
            assert row.memory_share == pytest.approx(row.bytes / row.seconds / 1e10)


def test_costs_are_those_of_the_compiler(artifact: Path) -> None:
    """Against analysis.cost over the printed step: a kernel's operations are its ops', bytes at most theirs."""
    manifest = read_manifest(artifact)
    table = read_calls(artifact, manifest)
    func = parse_module((artifact / "module.xir").read_text(), "module.xir").func("step")
    costs = Costs(func)
    sizes = {"N": 40, "B": 3, "S": 2, "P": 9, "context": 17}
    for calls in table.programs.values():
        kernels = [table.kernels[i] for i in calls.kernels]
        flops = sum(parse_dim(k.operations).evaluate(sizes) for k in kernels)
        moved = {
            name: sum(parse_dim(getattr(k, name)).evaluate(sizes) for k in kernels)
            for name in ("read", "written", "weights", "kv_read", "kv_written")
        }
        total = costs.total(sizes)
        assert flops == total.flops, "every op is computed by exactly one kernel"
        assert (moved["kv_read"], moved["kv_written"]) == (total.kv_read, total.kv_written)
        assert 0 < moved["read"] <= total.read and 0 < moved["written"] <= total.written
        assert 0.99 * total.weights <= moved["weights"] <= total.weights
        alone = [k for k in kernels if len(k.ops) == 1]
        of = {(op.name, costs.of[op].at(sizes).flops, costs.of[op].at(sizes).bytes) for op in func.ops}
        for k in alone:
            size = sum(parse_dim(getattr(k, n)).evaluate(sizes) for n in moved)
            found = (k.ops[0], parse_dim(k.operations).evaluate(sizes), size)
            assert found in of or k.ops[0] == "t.reshape", found


def test_the_trace_has_every_call_in_order_without_overlap(artifact: Path, profiled: Any) -> None:
    data = json.loads(profiled[2].read_text())
    table = read_calls(artifact, read_manifest(artifact))
    assert set(data) == {"traceEvents", "displayTimeUnit", "otherData"}
    names = {e["tid"]: e["args"]["name"] for e in data["traceEvents"] if e["name"] == "thread_name"}
    assert names == {1: "host", 2: "member 0", 3: "member 1"}
    timed = [e for e in data["traceEvents"] if e["ph"] == "X"]
    assert [e["ts"] for e in timed] == sorted(e["ts"] for e in timed)
    kernels = [e for e in timed if e["cat"] == "kernel"]
    steps = [e for e in timed if e["cat"] == "step"]
    assert len(steps) == 2 * STEPS
    programs = {e["name"].partition("(")[2].rstrip(")") for e in steps}
    assert programs <= set(table.programs)
    expected = sum(2 * len(table.programs[e["name"].partition("(")[2].rstrip(")")].kernels) for e in steps)
    assert len(kernels) == expected
    for tid in (2, 3):
        mine = [e for e in timed if e["tid"] == tid]
        ends = np.array([e["ts"] + e["dur"] for e in mine])
        starts = np.array([e["ts"] for e in mine])
        assert (starts[1:] - ends[:-1] > -0.01).all(), "slices of a thread follow each other"
    for e in kernels:
        assert any(s["ts"] - 50 <= e["ts"] <= s["ts"] + s["dur"] + 50 for s in steps)


def test_what_is_refused(artifact: Path) -> None:
    for steps in (0, 1001):
        with pytest.raises(XllmError, match="--profile-steps"):
            Profiler(steps, print)


def test_an_engine_that_ends_early_tells_what_there_is(artifact: Path) -> None:
    told: list[str] = []
    engine = prepare_engine(
        artifact, EngineOptions(threads=1, kv_cache_memory_bytes=POOL), Phases(), Profiler(50, told.append)
    ).engine
    engine.submit(Request("a", [1, 2, 3], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)), lambda e: None)
    while engine.stats().running or engine.stats().waiting:
        engine.step()
    engine.stop()
    assert len(told) == 2 and "no prefill step after the first one" in told[0]
    assert told[1].startswith("profile of decode") and "of 2 steps" in told[1] and "limits" in told[1]
