"""Write a checkpoint with random weights: any transformers causal-LM family, any size, tokenizer included.

    python -m xllm_compiler.models.random_checkpoint qwen3 -o DIR --preset tiny
    python -m xllm_compiler.models.random_checkpoint qwen3 -o DIR --preset qwen3-0.6b
    python -m xllm_compiler.models.random_checkpoint llama -o DIR --set hidden_size=256 --set num_hidden_layers=4

Owns shapes and seeds for tests and benchmarks; must not know how checkpoints are compiled. The files are what
`save_pretrained` writes, so they read like any published checkpoint.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from xllm_compiler.errors import XllmError
from xllm_compiler.models.byte_tokenizer import padded_tokenizer, write_tokenizer

TINY: Mapping[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 384,
    "max_position_embeddings": 512,
}
"""Small enough for a test, with grouped queries and sizes that are not powers of two."""

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "tiny": TINY,
    "qwen3-0.6b": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": True,
    },
}

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def random_config(family: str, settings: Mapping[str, Any] | None = None) -> Any:
    """The transformers config of `family` with `settings` on top of its defaults; token ids as in our tokenizers.

    Raises XllmError("option") for a family that the installed transformers does not have.
    """
    known = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
    try:
        return AutoConfig.for_model(family, **{**known, **(settings or {})})
    except ValueError as error:
        raise XllmError("option", f"transformers has no model family {family!r}", help=str(error)[:400]) from error


def fill_randomly(model: torch.nn.Module, seed: int, std: float) -> None:
    """Overwrite every parameter: matrices normal(0, std), norm scales near 1, biases near 0.

    The model's own initialisation would leave norms at 1 and biases at 0, and a mistake in either would not show.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
        if parameter.dim() >= 2:
            values = noise * std
        elif "norm" in name and name.endswith("weight"):
            values = parameter.detach().float().mean() + 0.1 * noise
        else:
            values = 0.1 * noise
        parameter.data = values.to(parameter.dtype)


def write_random_checkpoint(
    family: str,
    out_dir: Path,
    *,
    settings: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    seed: int = 0,
    std: float = 0.05,
    tokenizer: bool = True,
) -> Path:
    """Write a checkpoint of `family` to `out_dir` and return it.

    `settings` are config fields (default: TINY); `dtype` is a key of DTYPES; `std` is the standard deviation of the
    matrices (0.05 keeps the logits of small models apart). Raises XllmError("option") for unknown families or dtypes.
    """
    if dtype not in DTYPES:
        raise XllmError("option", f"unknown dtype {dtype!r}", help=f"one of {', '.join(DTYPES)}")
    config = random_config(family, TINY if settings is None else settings)
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[dtype])
    try:
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])
    finally:
        torch.set_default_dtype(before)
    fill_randomly(model, seed, std)
    model.generation_config = GenerationConfig(eos_token_id=[2, 0], pad_token_id=0)
    out_dir.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out_dir, max_shard_size="1GB")
    if tokenizer:
        length = int(getattr(config, "max_position_embeddings", None) or 2048)
        write_tokenizer(padded_tokenizer(int(config.vocab_size)), out_dir, length)
    return out_dir


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", help="transformers model_type, such as qwen3 or llama")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="tiny")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="a config field, on top of the preset"
    )
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    settings = dict(PRESETS[options.preset])
    for item in options.set:
        field, _, text = item.partition("=")
        try:
            settings[field] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            settings[field] = text
    try:
        write_random_checkpoint(
            options.family,
            options.out,
            settings=settings,
            dtype=options.dtype,
            seed=options.seed,
            std=0.05 if options.preset == "tiny" else 0.02,
        )
    except XllmError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
