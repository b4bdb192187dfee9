"""What requests hold in memory, in bytes: the sum, its bound, and what each part counts for.

The figures are upper estimates for 64-bit CPython.
"""

from __future__ import annotations

from xllm_compiler.runtime.outputs import Output
from xllm_compiler.runtime.pooling import PoolingParams
from xllm_compiler.runtime.sampling_params import SamplingParams

TOKEN = 48  # in a list of the server's, and in an array of the engine's
CHOICE = 16 * 2**10  # its sampler, text, table of pages and state of the answer
POOLED = 4 * 2**10  # a prompt that becomes an embedding: its table of pages, and its place in the answer
EVENT = 768  # an event from the engine on its way to the client
ENTRY = 256  # one token's log-probability, as an object and later as JSON


class Held:
    """One per server; the event loop's thread only."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0

    def fits(self, size: int) -> bool:
        return self.used + size <= self.limit


def of_prompt(tokens: int, params: SamplingParams | PoolingParams) -> int:
    """A prompt and its choices from the beginning, without the lists of `params`, which prompts may share."""
    if isinstance(params, PoolingParams):
        return TOKEN * tokens + POOLED
    size = TOKEN * tokens + CHOICE * params.n
    if params.prompt_logprobs is not None:  # the engine gathers them before anybody sees one
        size += tokens * (1 + params.prompt_logprobs) * ENTRY
    return size


def of_output(output: Output) -> int:
    """An event, but for the prompt's log-probabilities, which count from the beginning."""
    entries = sum(len(row) for row in output.logprobs) if output.logprobs else 0
    return EVENT + TOKEN * len(output.token_ids) + 4 * len(output.text) + ENTRY * entries
