"""Lengths that rope scaling allows: what models' own documentation says may be asked for, and the logits beyond the
original length."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.frontend.conftest import Make
from xllm_compiler.errors import XllmError
from xllm_compiler.frontend.checkpoint import Checkpoint
from xllm_compiler.frontend.lengths import lengths_of
from xllm_compiler.frontend.reference import reference_logits, stepped_logits
from xllm_compiler.frontend.trace import trace_checkpoint

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}

# The settings as the files of these models have them; how long they may be is from their model cards.
PUBLISHED: dict[str, tuple[dict[str, Any], int, int]] = {
    "Qwen2.5 with YaRN": ({"max_position_embeddings": 32768, "rope_scaling": {**YARN, "type": "yarn"}}, 32768, 131072),
    "Qwen3 with YaRN": ({"max_position_embeddings": 40960, "rope_scaling": YARN}, 40960, 131072),
    "Qwen3": ({"max_position_embeddings": 40960, "rope_scaling": None}, 40960, 40960),
    "DeepSeek-V3": (
        {
            "max_position_embeddings": 163840,
            "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "mscale": 1.0},
        },
        163840,
        163840,
    ),
    "gpt-oss": (
        {
            "max_position_embeddings": 131072,
            "rope_scaling": {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096},
        },
        131072,
        131072,
    ),
    "Llama 3.1": (
        {
            "max_position_embeddings": 131072,
            "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192},
        },
        131072,
        131072,
    ),
    "Llama 3.2": (
        {
            "max_position_embeddings": 131072,
            "rope_scaling": {"rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": 8192},
        },
        131072,
        131072,
    ),
    "Vicuna 16k": ({"max_position_embeddings": 4096, "rope_scaling": {"factor": 4.0, "type": "linear"}}, 4096, 16384),
    "Gemma 3": (
        {
            "max_position_embeddings": 131072,
            "rope_local_base_freq": 10000.0,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        },
        131072,
        131072,
    ),
    "Gemma 3, saved anew": (
        {
            "max_position_embeddings": 131072,
            "rope_parameters": {
                "full_attention": {"factor": 8.0, "rope_type": "linear", "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
        131072,
        131072,
    ),
    "Phi 3": (
        {
            "max_position_embeddings": 131072,
            "original_max_position_embeddings": 4096,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]},
        },
        131072,
        131072,
    ),
    "today's name": ({"max_position_embeddings": 128, "rope_parameters": {**YARN, "rope_theta": 1e4}}, 128, 131072),
    "by kind of layer": (
        {"max_position_embeddings": 8192, "rope_parameters": {"full_attention": YARN, "sliding_attention": {}}},
        8192,
        131072,
    ),
    "original at the top": (
        {
            "max_position_embeddings": 512,
            "original_max_position_embeddings": 512,
            "rope_scaling": {"type": "yarn", "factor": 2.0},
        },
        512,
        1024,
    ),
    "no original": ({"max_position_embeddings": 512, "rope_scaling": {"type": "yarn", "factor": 2.5}}, 512, 1280),
    "llama3 by hand": (
        {
            "max_position_embeddings": 8192,
            "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192},
        },
        8192,
        65536,
    ),
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_settings(model: str) -> None:
    config, trained, most = PUBLISHED[model]
    found = lengths_of(config)
    assert (found.trained, found.most) == (trained, most)
    assert bool(found.scaling) == (most > trained)


@pytest.mark.parametrize("factor", [None, "4", True, float("nan"), float("inf"), 0.5, -4, [4]])
def test_factors_that_are_none_allow_nothing(factor: Any) -> None:
    config = {"max_position_embeddings": 128, "rope_scaling": {"type": "yarn", "factor": factor}}
    assert lengths_of(config).most == 128


SCALED: dict[str, dict[str, Any]] = {
    "yarn": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "linear": {"type": "linear", "factor": 4.0},
    "llama3": {
        **{"rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 32},
        **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    },
}


def scaled(make: Make, family: str, rope: dict[str, Any]) -> Path:
    """As a user switches it on: a line more in config.json, the length as it was."""
    path = make(family, num_hidden_layers=1, max_position_embeddings=32)
    config = json.loads((path / "config.json").read_text())
    theta = (config.pop("rope_parameters", None) or {}).get("rope_theta", 1e4)
    (path / "config.json").write_text(json.dumps({**config, "rope_theta": theta, "rope_scaling": rope}))
    return path


@pytest.mark.parametrize(
    ("family", "kind"), [("qwen2", "yarn"), ("qwen3", "yarn"), ("llama", "linear"), ("llama", "llama3")]
)
def test_logits_beyond_the_original_length(family: str, kind: str, make: Make, limits: dict[str, Any]) -> None:
    path = scaled(make, family, SCALED[kind])
    traced = trace_checkpoint(Checkpoint.open(path), **{**limits, "max_model_len": 128})
    prompt = [int(i) for i in np.random.default_rng(0).integers(0, 384, 120)]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    want = reference_logits(model, prompt)
    (got,) = stepped_logits(traced.module, traced.weights, [prompt])
    np.testing.assert_allclose(got, want, atol=1e-4 * max(1.0, np.abs(want).max()))
    assert traced.info.max_model_len == 128


def test_one_more_is_too_long(make: Make, limits: dict[str, Any]) -> None:
    path = scaled(make, "qwen2", SCALED["yarn"])
    with pytest.raises(XllmError, match="129") as caught:
        trace_checkpoint(Checkpoint.open(path), **{**limits, "max_model_len": 129})
    assert caught.value.kind == "option" and "128" in caught.value.help


def test_frequencies_that_change_are_not_stretched(make: Make, limits: dict[str, Any]) -> None:
    path = scaled(make, "llama", {"type": "dynamic", "factor": 4.0})
    with pytest.raises(XllmError, match="dynamic") as caught:
        trace_checkpoint(Checkpoint.open(path), **{**limits, "max_model_len": 64})
    assert "at most 32" in caught.value.help
    trace_checkpoint(Checkpoint.open(path), **{**limits, "max_model_len": 32})


def test_a_model_without_rotary_embeddings_is_not_stretched(make: Make, limits: dict[str, Any]) -> None:
    path = make("gpt2", max_position_embeddings=32, n_positions=32)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "rope_scaling": SCALED["yarn"]}))
    with pytest.raises(XllmError, match="takes no notice") as caught:
        trace_checkpoint(Checkpoint.open(path), **{**limits, "max_model_len": 64})
    assert caught.value.kind == "option"
