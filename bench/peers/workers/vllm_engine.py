"""vLLM's engine in this process: requests added together, driven step by step, no prefix cache, no detokenizing."""

from __future__ import annotations

import itertools
import time

from protocol import Options, Steps, serve
from vllm import EngineArgs, LLMEngine, SamplingParams


class Engine:
    def __init__(self, options: Options) -> None:
        arguments = EngineArgs(
            model=options["model"],
            dtype="bfloat16",
            max_model_len=4096,
            max_num_seqs=64,
            max_num_batched_tokens=2048,
            enable_prefix_caching=False,
            enforce_eager=not options.get("compile", False),
        )
        self.engine = LLMEngine.from_engine_args(arguments)
        self._ids = itertools.count()

    def _add(self, prompts: list[list[int]], new: int) -> set[str]:
        params = SamplingParams(max_tokens=new, min_tokens=new, ignore_eos=True, temperature=0.0, detokenize=False)
        names = [f"bench-{next(self._ids)}" for _ in prompts]
        for name, ids in zip(names, prompts, strict=True):
            self.engine.add_request(name, {"prompt_token_ids": ids}, params)
        return set(names)

    def prefill(self, prompt: list[int]) -> float:
        start = time.perf_counter()
        self._add([prompt], 1)
        while self.engine.has_unfinished_requests():
            self.engine.step()
        return time.perf_counter() - start

    def decode(self, prompts: list[list[int]], new: int) -> tuple[int, float]:
        waiting = self._add(prompts, new)
        while waiting:
            waiting -= {output.request_id for output in self.engine.step() if output.outputs[0].token_ids}
        # requests prefilled in an earlier step are ahead, so stop with the first that is done
        steps = Steps(len(prompts))
        steps.start()
        running = True
        while running:
            running = not any(output.finished for output in self.engine.step())
            steps.mark()
        while self.engine.has_unfinished_requests():
            self.engine.step()
        return steps.total()


if __name__ == "__main__":
    serve(Engine)
