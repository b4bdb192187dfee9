"""What a client asks for, and what all sequences of one request share."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from xllm_compiler.runtime.outputs import Output, RequestMetrics
from xllm_compiler.runtime.pooling import PoolingParams
from xllm_compiler.runtime.sampler import prompt_ids
from xllm_compiler.runtime.sampling_params import SamplingParams

OnOutput = Callable[[Output], None]


@dataclass(slots=True)
class Request:
    """What a client asks for: text, or with PoolingParams an embedding. `prompt` is only carried along, for whoever
    wants to show it."""

    request_id: str
    prompt_token_ids: Sequence[int]
    params: SamplingParams | PoolingParams = field(default_factory=SamplingParams)
    prompt: str | None = None
    arrival: float = field(default_factory=time.monotonic)


class SequenceGroup:
    """What the `n` sequences of a request share: everything whose size a client chooses. `open`: sequences that are
    not finished."""

    __slots__ = ("metrics", "on_output", "open", "prompt", "request", "seen")

    def __init__(self, request: Request, on_output: OnOutput) -> None:
        self.request = request
        self.on_output = on_output
        self.open = request.params.n
        self.metrics = RequestMetrics(arrival=request.arrival)
        self.prompt = np.array(request.prompt_token_ids, np.int32)
        params = request.params
        # Only samplers want them.
        self.seen = np.empty(0, np.int64) if isinstance(params, PoolingParams) else prompt_ids(params, self.prompt)
