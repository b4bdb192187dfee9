"""Our engine, driven the way the server drives it: requests submitted together, tokens counted as they are told."""

from __future__ import annotations

import itertools
import queue
import time

from protocol import Options, Steps, serve

from xllm_compiler.runtime.llm import LLM
from xllm_compiler.runtime.outputs import Output
from xllm_compiler.runtime.request import Request
from xllm_compiler.runtime.sampling_params import SamplingParams


class Ours:
    # what 32 requests of 256 tokens need, and one of 2,048: the pool counts as resident memory
    KV_BYTES = 1 << 30

    def __init__(self, options: Options) -> None:
        self.llm = LLM(options["model"], threads=int(options["threads"]), kv_cache_memory_bytes=self.KV_BYTES)
        self._ids = itertools.count()

    def _events(self, prompts: list[list[int]], new: int) -> list[tuple[float, Output]]:
        """Every event of the requests and when it was told, until all are finished."""
        params = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
        told: queue.SimpleQueue[tuple[float, Output]] = queue.SimpleQueue()
        for ids in prompts:
            request = Request(f"bench-{next(self._ids)}", ids, params)
            self.llm.engine.submit(request, lambda output: told.put((time.perf_counter(), output)))
        events, open_requests = [], len(prompts)
        while open_requests:
            moment, output = told.get()
            if output.error is not None:
                raise output.error
            events.append((moment, output))
            open_requests -= output.finished
        return events

    def prefill(self, prompt: list[int]) -> float:
        start = time.perf_counter()
        return self._events([prompt], 1)[0][0] - start

    def decode(self, prompts: list[list[int]], new: int) -> tuple[int, float]:
        events = self._events(prompts, new)
        first: dict[str, float] = {}
        for moment, output in events:
            first.setdefault(output.request_id, moment)
        # from the last request's first token to the first request's last, all of them decode in every step; the
        # events of one request mark the steps
        latest = max(first, key=lambda name: first[name])
        end = min(moment for moment, output in events if output.finished)
        moments = [moment for moment, output in events if output.request_id == latest and output.token_ids]
        marks = [moment for index, moment in enumerate(moments) if index == 0 or moment <= end]
        steps = Steps(len(prompts))
        steps.seconds = [after - before for before, after in itertools.pairwise(marks)]
        return steps.total()


if __name__ == "__main__":
    serve(Ours)
