"""OpenVINO GenAI's LLMPipeline: a stateful model, all prompts of a call in one static batch."""

from __future__ import annotations

import itertools

import numpy as np
import openvino as ov
import openvino_genai as genai
from protocol import Options, Steps, serve


class Pipeline:
    def __init__(self, options: Options) -> None:
        threads = {"INFERENCE_NUM_THREADS": int(options["threads"]), "ATTENTION_BACKEND": "SDPA"}
        self.pipeline = genai.LLMPipeline(options["model"], "CPU", **threads)

    def _generate(self, prompts: list[list[int]], new: int) -> genai.RawPerfMetrics:
        ids = np.array(prompts, dtype=np.int64)
        config = genai.GenerationConfig(max_new_tokens=new, min_new_tokens=new, ignore_eos=True, do_sample=False)
        inputs = genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))
        return self.pipeline.generate(inputs, config).perf_metrics.raw_metrics

    def prefill(self, prompt: list[int]) -> float:
        return self._generate([prompt], 1).m_times_to_first_token[0] / 1e6

    def decode(self, prompts: list[list[int]], new: int) -> tuple[int, float]:
        times = self._generate(prompts, new).m_new_token_times  # milliseconds
        steps = Steps(len(prompts))
        steps.seconds = [(after - before) / 1e3 for before, after in itertools.pairwise(times)]
        return steps.total()


if __name__ == "__main__":
    serve(Pipeline)
