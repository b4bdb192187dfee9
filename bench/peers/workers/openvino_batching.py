"""OpenVINO GenAI's ContinuousBatchingPipeline: paged attention, requests scheduled step by step."""

from __future__ import annotations

import time

import numpy as np
import openvino as ov
import openvino_genai as genai
from protocol import Options, Steps, serve

RUNNING = genai.GenerationStatus.RUNNING


class Batching:
    def __init__(self, options: Options) -> None:
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = 1  # GiB
        scheduler.max_num_batched_tokens = 2048
        scheduler.max_num_seqs = 64
        scheduler.enable_prefix_caching = False
        threads = {"INFERENCE_NUM_THREADS": int(options["threads"])}
        self.pipeline = genai.ContinuousBatchingPipeline(options["model"], scheduler, "CPU", threads)
        self._next = 0

    def _add(self, prompts: list[list[int]], new: int) -> list[genai.GenerationHandle]:
        config = genai.GenerationConfig(max_new_tokens=new, min_new_tokens=new, ignore_eos=True, do_sample=False)
        handles = []
        for ids in prompts:
            self._next += 1
            handles.append(self.pipeline.add_request(self._next, ov.Tensor(np.array([ids], dtype=np.int64)), config))
        return handles

    def _finish(self, handles: list[genai.GenerationHandle]) -> None:
        # has_non_finished_requests() knows nothing of requests before the first step after they were added
        while any(handle.get_status() == RUNNING for handle in handles):
            self.pipeline.step()

    def prefill(self, prompt: list[int]) -> float:
        start = time.perf_counter()
        self._finish(self._add([prompt], 1))
        return time.perf_counter() - start

    def decode(self, prompts: list[list[int]], new: int) -> tuple[int, float]:
        handles = self._add(prompts, new)
        waiting = list(handles)
        while waiting:
            self.pipeline.step()
            waiting = [handle for handle in waiting if not handle.can_read()]
        # requests prefilled in an earlier step are ahead, so stop with the first that is done
        steps = Steps(len(prompts))
        steps.start()
        while all(handle.get_status() == RUNNING for handle in handles):
            self.pipeline.step()
            steps.mark()
        self._finish(handles)
        return steps.total()


if __name__ == "__main__":
    serve(Batching)
