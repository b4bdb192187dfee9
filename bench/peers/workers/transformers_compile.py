"""transformers with torch.compile: the whole forward pass, over a static cache, one graph per shape.

The cache holds prompt and answer exactly, since attention reads all of a static cache. A shape is compiled when it is
first asked for; the runner asks once for nothing before it measures.
"""

from __future__ import annotations

import time

import torch
from protocol import Options, Steps, serve
from transformers import StaticCache
from transformers_eager import load


class Compiled:
    def __init__(self, options: Options) -> None:
        self.model = load(options)
        torch._dynamo.config.cache_size_limit = 64
        self.forward = torch.compile(self._forward, dynamic=False)
        self._caches: dict[tuple[int, int], StaticCache] = {}

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor, cache: StaticCache) -> torch.Tensor:
        out = self.model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1, keepdim=True)

    def _cache(self, batch: int, length: int) -> StaticCache:
        """The cache of this shape, emptied: a new one would be a new graph."""
        key = (batch, length)
        if key not in self._caches:
            cache = self._caches[key] = StaticCache(config=self.model.config, max_cache_len=length)
            with torch.no_grad():
                # gives it its tensors: a cache that has none yet would be one graph more
                self._forward(torch.full((batch, 1), 3), torch.zeros(1, 1, dtype=torch.long), cache)
        self._caches[key].reset()
        return self._caches[key]

    def prefill(self, prompt: list[int]) -> float:
        cache = self._cache(1, len(prompt) + 32)
        start = time.perf_counter()
        with torch.no_grad():
            self.forward(torch.tensor([prompt]), torch.arange(len(prompt))[None], cache)
        return time.perf_counter() - start

    def decode(self, prompts: list[list[int]], new: int) -> tuple[int, float]:
        length = len(prompts[0])
        cache = self._cache(len(prompts), -(-(length + new) // 64) * 64)
        with torch.no_grad():
            # not measured here, so not worth a minute of compiling
            token = self._forward(torch.tensor(prompts), torch.arange(length)[None], cache)
        steps = Steps(len(prompts))
        steps.start()
        for step in range(new - 1):
            with torch.no_grad():
                token = self.forward(token, torch.tensor([[length + step]]), cache)
            steps.mark()
        return steps.total()


if __name__ == "__main__":
    serve(Compiled)
