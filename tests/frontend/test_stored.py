"""Weights and config that contradict each other: what transformers loads is what runs, everything else is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.frontend.conftest import Make
from xllm_compiler.errors import XllmError
from xllm_compiler.frontend.checkpoint import Checkpoint
from xllm_compiler.frontend.reference import load_reference, reference_logits, stepped_logits
from xllm_compiler.frontend.trace import Traced, trace_checkpoint

Weights = dict[str, torch.Tensor]
PROMPTS = [[5, 17, 101, 33, 250, 7]]
ONE = {"num_hidden_layers": 1}
Q = "model.layers.0.self_attn.q_proj"


def edit(path: Path, change: Callable[[Weights], object] = lambda w: None, **config: Any) -> Path:
    """Changes the stored tensors in place, and settings in config.json (None removes one)."""
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    raw = json.loads((path / "config.json").read_text())
    raw.update(config)
    (path / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not None}))
    return path


def as_transformers(path: Path, limits: dict[str, Any]) -> Traced:
    """Traces it, and holds its logits to those of transformers on the same directory."""
    traced = trace_checkpoint(Checkpoint.open(path), **limits)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    for got, prompt in zip(stepped_logits(traced.module, traced.weights, PROMPTS), PROMPTS, strict=True):
        want = reference_logits(model, prompt)
        np.testing.assert_allclose(got, want, atol=1e-4 * max(1.0, np.abs(want).max()))
    return traced


def refusal(path: Path, limits: dict[str, Any]) -> XllmError:
    with pytest.raises(XllmError) as caught:
        trace_checkpoint(Checkpoint.open(path), **limits)
    assert caught.value.kind in ("checkpoint", "unsupported") and caught.value.where
    return caught.value


# ------------------------------------------------------------------------------------------------------------- ties


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gpt_neox"])
def test_a_head_beside_a_tie_keeps_its_values(family: str, make: Make, limits: dict[str, Any]) -> None:
    path = edit(make(family, tie_word_embeddings=False, **ONE), tie_word_embeddings=True)
    notes = as_transformers(path, limits).notes
    assert len(notes) == 1 and "values of its own" in notes[0] and "tie_word_embeddings" in notes[0]


def test_one_value_that_differs_is_enough(make: Make, limits: dict[str, Any]) -> None:
    def nudge(w: Weights) -> None:
        w["lm_head.weight"] = w["model.embed_tokens.weight"].clone()
        w["lm_head.weight"][-1, -1] += 3

    path = edit(make("llama", tie_word_embeddings=True, **ONE), nudge)
    assert as_transformers(path, limits).notes


def test_an_equal_head_beside_a_tie_is_the_tie(make: Make, limits: dict[str, Any]) -> None:
    def store(w: Weights) -> None:
        w["lm_head.weight"] = w["model.embed_tokens.weight"].clone()

    traced = as_transformers(edit(make("llama", tie_word_embeddings=True, **ONE), store), limits)
    assert traced.notes == () and len([n for n in traced.weights if "embed" in n or "head" in n]) == 1


def test_a_head_without_its_embedding(make: Make, limits: dict[str, Any]) -> None:
    def swap(w: Weights) -> None:
        w["lm_head.weight"] = w.pop("model.embed_tokens.weight")

    assert as_transformers(edit(make("llama", tie_word_embeddings=True, **ONE), swap), limits).notes == ()


def test_no_tie_and_no_head(make: Make, limits: dict[str, Any]) -> None:
    path = edit(make("llama", tie_word_embeddings=True, **ONE), tie_word_embeddings=False)
    assert "'lm_head.weight' is missing" in refusal(path, limits).message


# ------------------------------------------------------------------------------------------------------- left over

CHANGES_THE_MODEL: dict[str, tuple[str, Callable[[Weights], object], str]] = {
    "bias": ("llama", lambda w: w.update({f"{Q}.bias": torch.ones(64)}), "no 'bias'"),
    "norm of queries": (
        "llama",
        lambda w: w.update({"model.layers.1.self_attn.q_norm.weight": torch.ones(16)}),
        "'q_norm'",
    ),
    "more layers": (
        "qwen2",
        lambda w: w.update({n.replace(".1.", ".2."): t.clone() for n, t in list(w.items()) if ".layers.1." in n}),
        "beyond the 2 of model.layers",
    ),
    "more layers of gpt2": (
        "gpt2",
        lambda w: w.update({"transformer.h.2.ln_1.weight": torch.ones(64)}),
        "beyond the 2 of transformer.h",
    ),
    "lora": ("llama", lambda w: w.update({f"{Q}.lora_A.weight": torch.ones(4, 64)}), "of an adapter"),
    "lora under its base": ("llama", lambda w: w.update({f"{Q}.base_layer.weight": w.pop(f"{Q}.weight")}), "adapter"),
    "gptq": ("llama", lambda w: w.update({f"{Q}.qweight": torch.zeros(8, 64, dtype=torch.int32)}), "quantized"),
    "scales": ("llama", lambda w: w.update({f"{Q}.weight_scale": torch.ones(64, 1)}), "quantized"),
    "bitsandbytes": ("llama", lambda w: w.update({f"{Q}.SCB": torch.ones(64)}), "quantized"),
    "twice": ("llama", lambda w: w.update({"embed_tokens.weight": torch.ones(384, 64)}), "different values"),
}


@pytest.mark.parametrize("kind", CHANGES_THE_MODEL)
def test_tensors_without_which_it_is_another_model(kind: str, make: Make, limits: dict[str, Any]) -> None:
    family, change, says = CHANGES_THE_MODEL[kind]
    error = refusal(edit(make(family), change), limits)
    assert error.kind == "checkpoint" and says in error.message
    assert "model.safetensors" in error.where


NAMED: dict[str, Callable[[Weights], object]] = {
    "value head": lambda w: w.update({"v_head.summary.weight": torch.ones(1, 64)}),
    "reward head": lambda w: w.update({"score.weight": torch.ones(2, 64)}),
    "vision": lambda w: w.update({"visual.blocks.0.attn.weight": torch.ones(2, 2)}),
    "bias of zeros": lambda w: w.update({f"{Q}.bias": torch.zeros(64)}),
}


@pytest.mark.parametrize("kind", NAMED)
def test_tensors_that_nobody_uses_are_named(kind: str, make: Make, limits: dict[str, Any]) -> None:
    path = make("llama", **ONE)
    before = set(load_file(path / "model.safetensors"))
    (note,) = as_transformers(edit(path, NAMED[kind]), limits).notes
    (added,) = set(load_file(path / "model.safetensors")) - before
    assert added in note and note.startswith("1 stored tensor")


SILENT: dict[str, tuple[str, Callable[[Weights], object]]] = {
    "frequencies": (
        "llama",
        lambda w: w.update({f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.full((8,), 7.0) for i in (0,)}),
    ),
    "frequencies under today's name": (
        "llama",
        lambda w: w.update({"model.rotary_emb.inv_freq": torch.full((8,), 7.0)}),
    ),
    "masks": (
        "gpt_neox",
        lambda w: w.update(
            {
                "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 128, 128, dtype=torch.bool),
                "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9),
            }
        ),
    ),
    "masks of gpt2": ("gpt2", lambda w: w.update({"transformer.h.0.attn.bias": torch.ones(1, 1, 128, 128)})),
}


@pytest.mark.parametrize("kind", SILENT)
def test_what_constructors_compute_is_left_out_in_silence(kind: str, make: Make, limits: dict[str, Any]) -> None:
    family, change = SILENT[kind]
    assert as_transformers(edit(make(family, **ONE), change), limits).notes == ()


def test_layers_that_guess_ahead_are_left_out(make: Make, limits: dict[str, Any]) -> None:
    """As DeepSeek and GLM store them: after the last layer."""
    path = edit(
        make("llama", **ONE),
        lambda w: w.update({"model.layers.1.eh_proj.weight": torch.ones(4, 4)}),
        num_nextn_predict_layers=1,
    )
    assert as_transformers(path, limits).notes == ()


def test_a_tensor_stored_under_two_names_with_equal_values(make: Make, limits: dict[str, Any]) -> None:
    path = edit(make("llama", **ONE), lambda w: w.update({"norm.weight": w["model.norm.weight"].clone()}))
    assert as_transformers(path, limits).notes == ()


def test_code_that_the_config_asks_for_is_not_fetched(make: Make, limits: dict[str, Any]) -> None:
    """An attention of the hub is code; transformers would download it for a config that names one."""
    path = edit(make("llama", **ONE), attn_implementation="kernels-community/flash-attn2", use_kernels=True)
    traced = trace_checkpoint(Checkpoint.open(path), **limits)
    (got,) = stepped_logits(traced.module, traced.weights, PROMPTS)
    want = reference_logits(load_reference(path), PROMPTS[0])
    np.testing.assert_allclose(got, want, atol=1e-4 * max(1.0, np.abs(want).max()))
