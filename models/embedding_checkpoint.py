"""Write a checkpoint that makes embeddings, with random weights and the files of sentence-transformers beside it.

Owns the shapes of those files for tests and benchmarks; must not know how they are read.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from xllm_compiler.models.random_checkpoint import write_random_checkpoint

_PACKAGE = "sentence_transformers.models"
_MODES = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")


def write_pooling(path: Path, *modes: str, normalize: bool = True, width: int = 64) -> None:
    """The files of sentence-transformers. `modes`: those of _MODES that are on."""
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), *([("2_Normalize", "Normalize")] if normalize else [])]
    listed = [
        {"idx": i, "name": str(i), "path": folder, "type": f"{_PACKAGE}.{kind}"}
        for i, (folder, kind) in enumerate(modules)
    ]
    (path / "modules.json").write_text(json.dumps(listed, indent=2))
    flags = {f"pooling_mode_{mode}": mode in modes for mode in _MODES}
    (path / "1_Pooling").mkdir(exist_ok=True)
    config = {"word_embedding_dimension": width, **flags, "include_prompt": True}
    (path / "1_Pooling" / "config.json").write_text(json.dumps(config, indent=2))


def write_embedding_checkpoint(
    family: str,
    path: Path,
    *modes: str,
    normalize: bool = True,
    head: bool = False,
    settings: Mapping[str, Any],
    dtype: str = "float32",
    seed: int = 0,
) -> Path:
    """Write it at `path`; without `head` it holds the base model alone. Raises XllmError("option") as
    `write_random_checkpoint` does."""
    write_random_checkpoint(family, path, settings=settings, dtype=dtype, seed=seed)
    if not head:
        base = AutoModelForCausalLM.from_pretrained(path, dtype="auto").base_model
        shutil.rmtree(path / "model.safetensors", ignore_errors=True)
        base.save_pretrained(path)
    write_pooling(path, *modes, normalize=normalize)
    return path
