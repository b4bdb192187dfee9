"""ONNX Runtime GenAI: its Generator over a static batch."""

from __future__ import annotations

import json
import time

import numpy as np
import onnxruntime_genai as og
from protocol import Options, Steps, serve


class Runtime:
    def __init__(self, options: Options) -> None:
        config = og.Config(options["model"])
        threads = int(options["threads"])
        session = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        self.model = og.Model(config)

    def _generator(self, prompts: list[list[int]], new: int) -> og.Generator:
        params = og.GeneratorParams(self.model)
        length = len(prompts[0]) + new
        params.set_search_options(batch_size=len(prompts), max_length=length, min_length=length, do_sample=False)
        return og.Generator(self.model, params)

    def prefill(self, prompt: list[int]) -> float:
        generator = self._generator([prompt], 2)
        start = time.perf_counter()
        generator.append_tokens(np.array([prompt], dtype=np.int32))
        generator.generate_next_token()
        return time.perf_counter() - start

    def decode(self, prompts: list[list[int]], new: int) -> tuple[int, float]:
        generator = self._generator(prompts, new)
        generator.append_tokens(np.array(prompts, dtype=np.int32))
        generator.generate_next_token()
        steps = Steps(len(prompts))
        steps.start()
        for _ in range(new - 1):
            generator.generate_next_token()
            steps.mark()
        return steps.total()


if __name__ == "__main__":
    serve(Runtime)
