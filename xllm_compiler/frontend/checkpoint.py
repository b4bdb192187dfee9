"""A checkpoint: a Hugging Face directory with its JSON files and the tensors of its safetensors shards, or a GGUF file.

Owns the checks that it is what it says it is, as far as they need no model. Every failure is an
`XllmError("checkpoint")` that names the file and the tensor. It never holds more than one tensor.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from xllm_compiler.frontend.counts import check_counts
from xllm_compiler.frontend.files import MAX_TEXT_BYTES, damaged, open_regular, read_json, stands_there
from xllm_compiler.frontend.gguf.architectures import architecture_of, entries_of
from xllm_compiler.frontend.gguf.config import config_of, generation_of
from xllm_compiler.frontend.gguf.file import GgufFile, is_gguf
from xllm_compiler.frontend.safetensors import Array, TensorEntry
from xllm_compiler.frontend.shards import INDEX, SINGLE, files_of, read_shards
from xllm_compiler.frontend.tokenizer import tokenizer_files

__all__ = ["INDEX", "SIDE_FILES", "SINGLE", "Array", "Checkpoint", "TensorEntry"]

SIDE_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""Settings of quantized weights beside config.json: of GPTQ and AWQ until early 2024, and of ModelOpt."""

_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")

_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint: `config` is config.json as it stands, `tensors` every tensor by its own name. Of a GGUF
    file both are as they would be in a directory, with the names of transformers."""

    path: Path  # the directory, or the GGUF file
    config: dict[str, Any]
    generation: dict[str, Any]  # generation_config.json, {} where there is none
    tensors: Mapping[str, TensorEntry]
    shards: tuple[Path, ...]
    beside: dict[str, dict[str, Any]] = field(default_factory=dict)  # those of SIDE_FILES that are there
    notes: tuple[str, ...] = ()  # what the user should know of files that do not agree
    gguf: GgufFile | None = None

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """Reads the JSON files and every shard's header. Raises XllmError("checkpoint" | "unsupported" | "io")."""
        root = Path(path)
        if not root.is_dir():
            if not stands_there(root):
                raise damaged(
                    "there is no such checkpoint", root, "give a local Hugging Face directory, or a GGUF file"
                )
            return cls._of_gguf(root)
        names = files_of(root)
        _refuse_other_kinds(root, names)
        config = _read_config(root / "config.json")
        _check_texts(root)
        tensors, shards, notes = read_shards(root, config)
        check_counts(config, root / "config.json", len(tensors))
        generation = read_json(root / "generation_config.json") if "generation_config.json" in names else {}
        beside = {name: read_json(root / name) for name in SIDE_FILES if name in names}
        return cls(root, config, generation, tensors, shards, beside, notes)

    @classmethod
    def _of_gguf(cls, path: Path) -> Checkpoint:
        if not is_gguf(path):
            raise damaged(f"{path.name} is no GGUF file", path, "give a Hugging Face directory, or a GGUF file")
        file = GgufFile.open(path)
        config, architecture = config_of(file, architecture_of(file))
        check_counts(config, path, len(file.tensors))
        tensors = entries_of(file, architecture, config)
        return cls(path, config, generation_of(file), tensors, (path,), notes=file.notes, gguf=file)

    @classmethod
    def without_weights(cls, config: Path) -> Checkpoint:
        """What a config.json alone describes. Raises XllmError("checkpoint" | "io")."""
        raw = _read_config(config)
        check_counts(raw, config, 0)
        return cls(config.parent, raw, {}, {}, ())

    @property
    def config_file(self) -> Path:
        """The file that `config` was read from."""
        return self.path / "config.json" if self.gguf is None else self.path

    def read(self, name: str) -> Array:
        """The tensor as stored, in fresh memory. The caller has checked that the name exists."""
        entry = self.tensors[name]
        return entry.read().reshape(entry.shape)

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors have the same shape and values, read a piece at a time."""
        a, b = self.tensors[one], self.tensors[other]
        return a.shape == b.shape and all(np.array_equal(x, y) for x, y in zip(_pieces(a), _pieces(b), strict=True))


def _pieces(entry: TensorEntry, most: int = 1 << 22) -> Iterator[Array]:
    total = int(np.prod(entry.shape, dtype=np.int64))
    for first in range(0, total, most):
        piece = entry.read(first, min(most, total - first))
        yield piece.astype(np.float64) if entry.is_float and piece.dtype.itemsize < 8 else piece


def _read_config(path: Path) -> dict[str, Any]:
    """config.json, and nothing that sends a reader on to another file."""
    if not stands_there(path):
        raise damaged("config.json is missing", path, "a checkpoint directory has config.json and *.safetensors")
    config = read_json(path)
    if config.get("configuration_files"):
        raise damaged(
            "config.json names other files for other versions of transformers (configuration_files)",
            path,
            "keep the one that describes the weights, as config.json",
        )
    return config


def _check_texts(root: Path) -> None:
    """Tokenizers and templates are files of a bearable size, and JSON where they should be: whoever reads them later
    may wait for a pipe, or meet the damage in a third party's parser."""
    for name in tokenizer_files(root):
        open_regular(root / name, MAX_TEXT_BYTES).close()
        if name in _SETTINGS:
            read_json(root / name, twice=True)


def _refuse_other_kinds(root: Path, names: list[str]) -> None:
    """Directories that are something else than the checkpoint of a whole model."""
    adapter = next((name for name in _ADAPTER if name in names), None)
    if adapter is not None:
        raise damaged(
            f"the directory holds an adapter ({adapter}), which changes the model that it belongs to",
            root,
            "merge it into its base model (in PEFT: merge_and_unload, then save_pretrained) and compile the result",
        )
    own = [name for name in names if name.endswith(".gguf")]
    if "config.json" not in names and own:
        raise damaged(
            f"config.json is missing, but there is {own[0]}",
            root,
            f"compile the file itself: {root / own[0]}",
        )
    if "config.json" not in names and ("params.json" in names or any(n.startswith("consolidated.") for n in names)):
        raise damaged(
            "config.json is missing: this is the format of Meta or Mistral (params.json, consolidated.*)",
            root / "config.json",
            "take the checkpoint's Hugging Face form, or convert it",
        )
