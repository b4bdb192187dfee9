"""What the engine counts. Data only; whoever exports metrics reads snapshots of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from xllm_compiler.errors import XllmError


@dataclass(slots=True)
class EngineStats:
    """Counters since the start and gauges of the moment. `step_seconds` splits the time of all steps by phase."""

    running: int = 0
    waiting: int = 0
    kv_pages_used: int = 0
    kv_pages_total: int = 0
    steps: int = 0
    step_tokens: int = 0  # tokens of all steps, recomputed ones included
    prompt_tokens: int = 0
    generation_tokens: int = 0
    draft_tokens: int = 0  # run behind decodes; `accepted_draft_tokens` of them were drawn
    accepted_draft_tokens: int = 0
    preemptions: int = 0
    recomputed_tokens: int = 0
    callback_errors: int = 0
    finished: dict[str, int] = field(default_factory=lambda: {"stop": 0, "length": 0, "abort": 0, "error": 0})
    step_seconds: dict[str, float] = field(
        default_factory=lambda: {"schedule": 0.0, "prepare": 0.0, "execute": 0.0, "sample": 0.0}
    )

    @property
    def kv_usage(self) -> float:
        """Share of the KV pages in use, 0 to 1."""
        return self.kv_pages_used / self.kv_pages_total if self.kv_pages_total else 0.0


@dataclass(frozen=True, slots=True)
class Health:
    """`alive`: the loop runs and can serve. `busy`: requests are queued or running. `stalled_s`: seconds since a step
    finished while busy; 0.0 when idle. A server is healthy while it is alive and `stalled_s` is small: a port that
    answers is no sign of life."""

    alive: bool
    busy: bool
    stalled_s: float
    error: XllmError | None
