"""The metrics of the engine, the connections and the start: their names, and where the numbers come from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from xllm_compiler.runtime.model_info import ModelInfo
from xllm_compiler.runtime.server.connection_guard import ConnectionGuard
from xllm_compiler.runtime.server.metrics import Sample
from xllm_compiler.runtime.server.outlets import dropped_lines
from xllm_compiler.runtime.stats import EngineStats, Health


class Observed(Protocol):
    """What is read from an engine."""

    def stats(self) -> EngineStats: ...
    def health(self) -> Health: ...


def engine_samples(engine: Observed) -> Callable[[], Iterable[Sample]]:
    """vLLM's names where vLLM has the number, ours under `xllm:`."""

    def read() -> Iterable[Sample]:
        stats, health = engine.stats(), engine.health()
        yield Sample("gauge", "vllm:num_requests_running", "Choices in the running batch.", stats.running)
        yield Sample("gauge", "vllm:num_requests_waiting", "Choices that wait to run.", stats.waiting)
        yield Sample("gauge", "vllm:kv_cache_usage_perc", "Share of KV pages in use, 0 to 1.", stats.kv_usage)
        yield Sample("counter", "vllm:num_preemptions", "Choices sent back to the queue.", stats.preemptions)
        yield Sample("counter", "xllm:recomputed_tokens", "Tokens computed again.", stats.recomputed_tokens)
        yield Sample("counter", "xllm:engine_steps", "Steps run.", stats.steps)
        yield Sample("counter", "xllm:engine_step_tokens", "Tokens of all steps.", stats.step_tokens)
        age = "Seconds since a step finished while there is work; 0 when idle."
        yield Sample("gauge", "xllm:engine_heartbeat_age_seconds", age, health.stalled_s)
        for phase, seconds in stats.step_seconds.items():
            yield Sample("counter", "xllm:step_seconds", "Time of all steps, by phase.", seconds, {"phase": phase})

    return read


def connection_samples(guard: ConnectionGuard) -> Callable[[], Iterable[Sample]]:
    def read() -> Iterable[Sample]:
        yield Sample("gauge", "xllm:connections_open", "Open connections.", guard.open)
        yield Sample("counter", "xllm:connections_timed_out", "Closed for sending no request.", guard.timed_out)
        yield Sample("counter", "xllm:connections_evicted", "Idle ones closed to make room.", guard.evicted)
        for code, count in sorted(guard.refused.items()):
            text = "Requests refused before any handler saw them, by the error's code."
            yield Sample("counter", "xllm:requests_refused", text, count, {"code": code})
        budget = guard.budget
        yield Sample("gauge", "xllm:arriving_bytes", "Bytes of unfinished requests in memory.", budget.used)
        yield Sample("gauge", "xllm:arriving_bytes_peak", "The most there have been.", budget.peak)
        yield Sample("gauge", "xllm:arriving_bytes_limit", "The most there may be.", budget.limit)
        yield Sample("counter", "xllm:arriving_given_up", "Unfinished requests that made room.", budget.given_up)

    return read


def log_samples(dropped: Callable[[], Mapping[str, int]] = dropped_lines) -> Callable[[], Iterable[Sample]]:
    """`dropped`: how many lines of each stream nobody read."""

    def read() -> Iterable[Sample]:
        for stream, count in dropped().items():
            text = "Lines that nobody read in time, by stream."
            yield Sample("counter", "xllm:log_lines_dropped", text, count, {"stream": stream})

    return read


def start_samples(
    model_info: ModelInfo, memory: Sequence[tuple[str, int]], pages: int, phases: Mapping[str, float]
) -> Callable[[], Iterable[Sample]]:
    """What was decided at the start: memory by class in bytes, pages of the KV pool, seconds by phase."""
    cache = {"block_size": str(model_info.page_tokens), "num_cpu_blocks": str(pages), "cache_dtype": model_info.dtype}
    artifact = {"id": model_info.artifact_id, "architecture": model_info.architecture, "dtype": model_info.dtype}

    def read() -> Iterable[Sample]:
        yield Sample("gauge", "vllm:cache_config_info", "How the KV cache is laid out.", 1, cache)
        yield Sample("gauge", "xllm:artifact_info", "What is served.", 1, artifact)
        for name, size in memory:
            yield Sample("gauge", "xllm:memory_bytes", "Memory by class.", size, {"class": name})
        for name, seconds in phases.items():
            yield Sample("gauge", "xllm:startup_phase_seconds", "Start-up by phase.", seconds, {"phase": name})

    return read
