"""Which files of a checkpoint directory hold its weights. Owns the choice, which is transformers' own, the checks that
an index and its shards agree, and the notes on files that look like weights and are not read; parsing one file is
`safetensors`' business."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from xllm_compiler.errors import XllmError
from xllm_compiler.frontend.files import damaged, read_json, stands_there
from xllm_compiler.frontend.safetensors import TensorEntry, read_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_OTHER_FORMATS = (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")


def listing(names: Iterable[str], most: int = 3) -> str:
    """Names for a message: the first few, and how many more there are."""
    every = sorted(names)
    more = f" and {len(every) - most} more" if len(every) > most else ""
    return ", ".join(every[:most]) + more


def read_shards(
    root: Path, config: Mapping[str, Any]
) -> tuple[dict[str, TensorEntry], tuple[Path, ...], tuple[str, ...]]:
    """Every tensor by its name, the files that hold them, and what the user should know of files that do not agree.
    Raises XllmError("checkpoint" | "io")."""
    names = files_of(root)
    distributed = [name for name in names if _DISTRIBUTED.fullmatch(name)]
    if distributed:
        raise damaged(
            f"{listing(distributed)}: the weights were saved by several processes, each its own part",
            root,
            "load the model with transformers and save it again with save_pretrained",
        )
    single, index = SINGLE in names, INDEX in names
    explicit = config.get("transformers_weights")
    if explicit is not None:
        if explicit not in (SINGLE, INDEX):
            raise damaged(
                f"config.json says that the weights are in {explicit!r} (transformers_weights)",
                root / "config.json",
                f"save the model with save_pretrained: only {SINGLE} and {INDEX} are read",
            )
        single, index = explicit == SINGLE, explicit == INDEX
    if single and index and _mapped(root / INDEX) != {SINGLE}:
        raise damaged(
            f"there are both {SINGLE} and {INDEX}, which names other files",
            root,
            "one of them is left from an older download or save: transformers would read the first, others the second. "
            "Remove what does not belong to the model",
        )
    tensors: dict[str, TensorEntry]
    shards: tuple[Path, ...]
    notes: list[str] = []
    if single:
        tensors, shards = read_header(root / SINGLE), (root / SINGLE,)
    elif index:
        tensors, shards, notes = _read_index(root)
    else:
        raise _no_weights(root, names)
    unread = {name for name in names if name.endswith(".safetensors")} - {shard.name for shard in shards}
    if unread:
        by = INDEX if not single else SINGLE
        notes.append(f"not read, since the weights are those of {by}: {listing(unread)}")
    return tensors, shards, tuple(notes)


def files_of(root: Path) -> list[str]:
    """The names in the directory, sorted. Raises XllmError("checkpoint" | "io")."""
    try:
        return sorted(os.listdir(root))
    except OSError as error:
        raise XllmError("io", f"cannot read the directory: {error.strerror}", where=str(root)) from None


def _weight_map(index: Path) -> tuple[dict[str, str], Mapping[str, Any]]:
    """Tensor -> file, and the whole index."""
    raw = read_json(index)
    weight_map = raw.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise damaged(f"{INDEX} has no weight_map", index)
    for tensor, file in weight_map.items():
        # A shard is a file of this directory: no way out of it through the index.
        if not isinstance(file, str) or not file or file in (".", "..") or set(file) & set("/\\\0"):
            raise damaged(f"{INDEX} puts tensor {tensor!r} into {file!r}, which is not a file name", index)
    return weight_map, raw


def _mapped(index: Path) -> set[str]:
    return set(_weight_map(index)[0].values())


def _read_index(root: Path) -> tuple[dict[str, TensorEntry], tuple[Path, ...], list[str]]:
    index = root / INDEX
    weight_map, raw = _weight_map(index)
    ordered = sorted(weight_map.items())
    shards = tuple(root / name for name in sorted(set(weight_map.values())))
    tensors: dict[str, TensorEntry] = {}
    for shard in shards:
        if not stands_there(shard):
            first = next(t for t, f in ordered if f == shard.name)
            raise damaged(f"shard {shard.name} is missing; tensor {first!r} is in it", shard, "download it")
        for name, entry in read_header(shard).items():
            if name in tensors:
                raise damaged(f"tensor {name!r} is both in {tensors[name].file.name} and in {shard.name}", shard)
            tensors[name] = entry
    for tensor, file in ordered:
        if tensor not in tensors or tensors[tensor].file.name != file:
            raise damaged(f"tensor {tensor!r} is not in {file}, where {INDEX} puts it", root / file)
    notes = []
    unlisted = tensors.keys() - weight_map.keys()
    if unlisted:  # transformers reads whole shards, so they count all the same
        notes.append(f"{len(unlisted)} tensors of the shards are not in {INDEX}: {listing(unlisted)}")
    metadata = raw.get("metadata")
    said = metadata.get("total_size") if isinstance(metadata, dict) else None
    total = sum(entry.nbytes for entry in tensors.values())
    if isinstance(said, (int, float)) and not isinstance(said, bool) and said != total:
        notes.append(f"{INDEX} says that all tensors have {said} bytes together, they have {total}")
    return tensors, shards, notes


def _no_weights(root: Path, names: list[str]) -> XllmError:
    """What is there instead."""
    safe = [name for name in names if name.endswith(".safetensors")]
    others = [name for name in names if name.endswith(_OTHER_FORMATS)]
    missing = f"there are no weights: neither {SINGLE} nor {INDEX}"
    if safe:
        own = "consolidated" in safe[0]
        help = "that is Mistral's own format; take the checkpoint's Hugging Face form" if own else ""
        again = f"download {INDEX}" if len(safe) > 1 else f"if these are the weights, name the file {SINGLE}"
        return damaged(f"{missing}, but {listing(safe)}", root, help or again)
    if others:
        own = others[0].endswith(".gguf")
        help = f"compile the file itself: {root / others[0]}" if own else "convert them with save_pretrained first"
        return damaged(f"the weights are not safetensors but {others[0]}", root, help)
    return damaged(missing, root)
