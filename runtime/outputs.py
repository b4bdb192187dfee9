"""What the engine returns, in vLLM's shapes and names. Data only."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from xllm_compiler.errors import XllmError


@dataclass(slots=True)
class Logprob:
    """Natural-log probability of a token under the model's own distribution; `rank` 1 is the most likely.

    `decoded_token` is what the token adds to the text in its place, so those of an answer join to its text. It is ""
    for a token that leaves a character unfinished. A token that is not part of the text has its name there; `shown`
    tells which. `token_bytes` are the token's own bytes. Both are None where the model has no tokenizer.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None
    token_bytes: bytes | None = None
    shown: bool = True


LogprobDict = dict[int, Logprob]  # the chosen token first, then the alternatives from the most likely down


@dataclass(slots=True)
class RequestMetrics:
    """Times on `time.monotonic()`'s clock, in seconds; 0.0 when that moment did not come."""

    arrival: float = 0.0
    first_scheduled: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0
    finished: float = 0.0
    preemptions: int = 0


@dataclass(slots=True)
class Output:
    """One event of one sequence of a request: what is new since the event before.

    `text` is what may be shown now. Partial characters and possible stop strings are held back, so there can be tokens
    without text. `finish_reason` is None until the sequence's last event, then "stop", "length", "abort" or "error".
    `finished` is true on the last event of the whole request, of all its `n` sequences. `prompt_logprobs` comes once,
    on the first event of sequence 0; its first item is None. `embedding`: what the only event of a request for one
    tells, f32[size].
    """

    request_id: str
    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[LogprobDict] | None = None
    prompt_logprobs: list[LogprobDict | None] | None = None
    embedding: NDArray[np.float32] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: XllmError | None = None
    finished: bool = False
    time: float = 0.0
    metrics: RequestMetrics | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One sequence. `cumulative_logprob` is the sum over its tokens, where logprobs were asked for."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[LogprobDict] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def add(self, event: Output) -> None:
        """Append one event of this sequence."""
        self.text += event.text
        self.token_ids.extend(event.token_ids)
        if event.logprobs is not None:
            if self.logprobs is None:
                self.logprobs = []
            self.logprobs.extend(event.logprobs)
            chosen = zip(event.token_ids, event.logprobs, strict=True)
            self.cumulative_logprob = (self.cumulative_logprob or 0.0) + sum(d[t].logprob for t, d in chosen)
        if event.finish_reason is not None:
            self.finish_reason, self.stop_reason = event.finish_reason, event.stop_reason


@dataclass(slots=True)
class RequestOutput:
    """The whole result of a request; `outputs` has its `n` sequences in order."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[LogprobDict | None] | None = None
    finished: bool = False
    metrics: RequestMetrics | None = None

    def add(self, event: Output) -> None:
        """Add one event; `outputs` must already hold every sequence."""
        self.outputs[event.index].add(event)
        if event.prompt_logprobs is not None:
            self.prompt_logprobs = event.prompt_logprobs
        self.finished = self.finished or event.finished
        if event.metrics is not None:
            self.metrics = event.metrics


@dataclass(slots=True)
class EmbeddingOutput:
    """A prompt's embedding."""

    embedding: list[float]


@dataclass(slots=True)
class EmbeddingRequestOutput:
    """The whole result of a request for an embedding."""

    request_id: str
    outputs: EmbeddingOutput
    prompt_token_ids: list[int]
    finished: bool = True
