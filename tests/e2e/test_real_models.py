"""Real models in GGUF files: the compiled model answers what transformers answers on the same file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from real_models import MODELS
from stepper import options
from transformers import AutoModelForCausalLM, AutoTokenizer

from xllm_compiler.driver import compile_checkpoint
from xllm_compiler.runtime.llm import LLM, SamplingParams

PROMPTS = (
    "The capital of France is",
    "Write a short poem about the sea.",
    "Once upon a time, in a village by the river,",
    "2 + 2 = 4, 3 + 3 =",
    "The three laws of motion are",
    "def quicksort(a):\n",
    "import numpy as np\n\n# The mean of every row\n",
    "Die Hauptstadt von Deutschland ist",
    "Ein Rezept für Apfelkuchen: Zuerst",
    "Warum ist der Himmel blau?",
    "Il était une fois une petite fille qui",
    "La recette de la ratatouille :",
    "Érase una vez un rey que",
    "El agua hierve a cien grados porque",
    "Столица России",
    "Жили-были старик со старухой",
    "日本の首都は",
    "吾輩は猫である。名前は",
    "<|im_start|>user\nWhat is 12 * 12?<|im_end|>\n<|im_start|>assistant\n",
    "<start_of_turn>user\nName three colours.<end_of_turn>\n<start_of_turn>model\n",
)
NEW = 40


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_greedy_answers_in_f32_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """20 prompts in six languages, 40 tokens each. Theirs is run once over prompt and answer: if its best token is ours
    at every position, its own greedy answer is ours too."""
    path = MODELS[name](tmp_path)
    artifact = tmp_path / "artifact"
    compile_checkpoint(path, artifact, replace(options("float32"), max_model_len=512))
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    asked = [list(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]
    with LLM(artifact) as llm:
        outputs = llm.generate(list(PROMPTS), SamplingParams(max_tokens=NEW, temperature=0.0, ignore_eos=True))
    assert [list(output.prompt_token_ids) for output in outputs] == asked
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    for ids, output, prompt in zip(asked, outputs, PROMPTS, strict=True):
        answer = list(output.outputs[0].token_ids)
        with torch.no_grad():
            theirs = model(input_ids=torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1].argmax(-1)
        assert len(answer) == NEW and theirs.tolist() == answer, prompt
