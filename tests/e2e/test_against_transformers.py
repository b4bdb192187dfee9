"""The compiled models answer what transformers answers: the four families at tiny size and the bundled model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from stepper import Stepper
from transformers import AutoModelForCausalLM

from xllm_compiler.runtime.llm import LLM, SamplingParams

FAMILIES = ("qwen2", "qwen3", "llama", "mistral", "bundled")
LENGTHS = (1, 2, 3, 5, 8, 13, 15, 16, 17, 23, 31, 32, 33, 47, 64, 65, 90, 127, 128, 200)
NEW = 64


def prompts(vocab: int) -> list[list[int]]:
    rng = np.random.default_rng(7)
    return [[int(i) for i in rng.integers(3, vocab, length)] for length in LENGTHS]


def their_logits(model: torch.nn.Module, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].float().numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_gives_the_same_tokens_and_logits(
    family: str, checkpoint: Callable[[str], Path], artifact: Callable[[str, str], Path]
) -> None:
    """Greedy tokens over 64 steps, 20 prompts served together; every logit of prompt and answer within 1e-4.

    Theirs is run once over prompt and answer: if its best token is ours at every position, its own greedy generation is
    ours too.
    """
    model = AutoModelForCausalLM.from_pretrained(checkpoint(family), dtype=torch.float32).eval()
    asked = prompts(model.config.vocab_size)
    params = SamplingParams(max_tokens=NEW, temperature=0.0, ignore_eos=True)
    path = artifact(family, "float32")
    with LLM(path) as llm:
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in asked], params)
    with Stepper(path) as stepper:
        for ids, output in zip(asked, outputs, strict=True):
            answer = output.outputs[0].token_ids
            assert len(answer) == NEW
            theirs = their_logits(model, ids + answer)
            assert theirs[len(ids) - 1 : -1].argmax(-1).tolist() == answer, f"prompt of {len(ids)} tokens"
            ours = stepper.all_logits(ids + answer, chunk=128)
            assert np.abs(ours - theirs).max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_close(
    family: str, checkpoint: Callable[[str], Path], artifact: Callable[[str, str], Path]
) -> None:
    """Where the greedy tokens first differ, each side's token is among the other's best five."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint(family), dtype=torch.bfloat16).eval()
    asked = prompts(model.config.vocab_size)
    params = SamplingParams(max_tokens=NEW, temperature=0.0, ignore_eos=True, logprobs=5)
    with LLM(artifact(family, "bfloat16")) as llm:
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in asked], params)
    for ids, output in zip(asked, outputs, strict=True):
        answer = output.outputs[0].token_ids
        theirs = their_logits(model, ids + answer)[len(ids) - 1 : -1]
        differs = np.flatnonzero(theirs.argmax(-1) != np.array(answer))
        if len(differs):
            at = int(differs[0])
            assert answer[at] in np.argsort(theirs[at])[-5:]
            assert output.outputs[0].logprobs is not None
            assert int(theirs[at].argmax()) in output.outputs[0].logprobs[at]
