"""transformers as it comes: eager, its dynamic cache, a static batch of prompts of one length."""

from __future__ import annotations

import time

import torch
from protocol import Options, Steps, serve
from transformers import AutoModelForCausalLM


def load(options: Options) -> torch.nn.Module:
    """The model in bf16, its linears quantized by torchao where `options` say so."""
    torch.set_num_threads(int(options["threads"]))
    model = AutoModelForCausalLM.from_pretrained(options["model"], dtype=torch.bfloat16).eval()
    how = options.get("torchao")
    if how is not None:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        if how == "int8":
            quantize_(model, Int8DynamicActivationInt8WeightConfig())
        else:
            from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

            quantize_(model, PrototypeInt4WeightOnlyConfig(group_size=32))
    return model


class Eager:
    def __init__(self, options: Options) -> None:
        self.model = load(options)

    def _step(self, ids: torch.Tensor, cache: object = None) -> tuple[torch.Tensor, object]:
        with torch.inference_mode():
            out = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            return out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values

    def prefill(self, prompt: list[int]) -> float:
        ids = torch.tensor([prompt])
        start = time.perf_counter()
        self._step(ids)
        return time.perf_counter() - start

    def decode(self, prompts: list[list[int]], new: int) -> tuple[int, float]:
        token, cache = self._step(torch.tensor(prompts))
        steps = Steps(len(prompts))
        steps.start()
        for _ in range(new - 1):
            token, cache = self._step(token, cache)
            steps.mark()
        return steps.total()


if __name__ == "__main__":
    serve(Eager)
