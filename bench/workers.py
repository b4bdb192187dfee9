"""The processes that `serving.py` compares: each loads one backend and answers measurements over a pipe, in JSON lines.

    python bench/workers.py xllm ARTIFACT
    python bench/workers.py transformers CHECKPOINT

A request is {"prompt": tokens, "new": tokens, "batch": requests, "seed": int}; the answer has "prefill_s" (arrival to
the first token of the first) and "decode_s" (from when every request has its first token until all have their last),
in seconds. Prompts are random ids, fixed by the seed, so that both backends see the same.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from typing import Any

import numpy as np


def prompts(batch: int, length: int, vocab: int, seed: int) -> list[list[int]]:
    """`batch` prompts of `length` random token ids."""
    rng = np.random.default_rng(seed)
    return [[int(i) for i in rng.integers(3, vocab, length)] for _ in range(batch)]


class XllmBackend:
    """Our engine, driven the way the server drives it."""

    def __init__(self, path: str) -> None:
        from xllm_compiler.runtime.llm import LLM

        self.llm = LLM(path)
        self.vocab = self.llm.engine.model_info.vocab_size

    def measure(self, prompt: int, new: int, batch: int, seed: int) -> dict[str, Any]:
        from xllm_compiler.runtime.llm import SamplingParams

        before = self.llm.engine.stats()
        steps, seconds = before.steps, dict(before.step_seconds)
        params = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
        texts = [{"prompt_token_ids": ids} for ids in prompts(batch, prompt, self.vocab, seed)]
        outputs = self.llm.generate(texts, params)
        after = self.llm.engine.stats()
        times = [output.metrics for output in outputs if output.metrics is not None]
        first, last = max(t.first_token for t in times), max(t.last_token for t in times)
        split = {name: after.step_seconds[name] - seconds[name] for name in seconds}
        return {
            "prefill_s": times[0].first_token - times[0].arrival,
            "decode_s": last - first,
            "decode_tokens": batch * (new - 1),
            "steps": after.steps - steps,
            "step_seconds": split,
        }


class TransformersBackend:
    """Eager transformers in bf16 with its own dynamic cache."""

    def __init__(self, path: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
        self.vocab = self.model.config.vocab_size

    def measure(self, prompt: int, new: int, batch: int, seed: int) -> dict[str, Any]:
        torch = self.torch
        ids = torch.tensor(prompts(batch, prompt, self.vocab, seed))
        with torch.inference_mode():
            start = time.perf_counter()
            out = self.model(input_ids=ids, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            first = time.perf_counter()
            cache = out.past_key_values
            for _ in range(new - 1):
                out = self.model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
                token = out.logits[:, -1].argmax(-1, keepdim=True)
            last = time.perf_counter()
        return {"prefill_s": first - start, "decode_s": last - first, "decode_tokens": batch * (new - 1)}


def peak_bytes() -> int:
    """The most memory this process has had resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Load, say so, then answer until the pipe closes."""
    kind, path = sys.argv[1:]
    # libraries print to stdout now and then: keep the pipe for answers alone
    pipe = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    backend = XllmBackend(path) if kind == "xllm" else TransformersBackend(path)
    print(json.dumps({"ready": True}), file=pipe)
    for line in sys.stdin:
        answer = backend.measure(**json.loads(line))
        print(json.dumps({**answer, "peak_bytes": peak_bytes()}), file=pipe)


if __name__ == "__main__":
    main()
