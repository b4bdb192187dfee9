"""What a checkpoint says of embeddings: the files of sentence-transformers beside it. Owns which of their pooling modes
we have; whatever else those files ask for is refused. Must not import torch.

    modules.json                          the modules in order: Transformer, Pooling and perhaps Normalize
    1_Pooling/config.json                 which hidden states are pooled; modules.json names the folder
    sentence_bert_config.json             settings of the tokenizer
    config_sentence_transformers.json     prompts
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

from xllm_compiler.errors import XllmError
from xllm_compiler.frontend.checkpoint import Checkpoint
from xllm_compiler.frontend.files import MAX_JSON_BYTES, damaged, parse_json, read_json, read_regular, stands_there
from xllm_compiler.step.interface import EMBED, STEP, Pooling

MODULES: Final = "modules.json"
_TEXTS: Final = "sentence_bert_config.json"
_PROMPTS: Final = "config_sentence_transformers.json"
_FOLDER: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,100}\Z")
_MODES: Final = {"lasttoken": "last", "mean_tokens": "mean", "cls_token": "cls"}
_NAMES: Final = {"lasttoken": "last", "mean": "mean", "cls": "cls"}  # of newer versions, in `pooling_mode`
_HEADS: Final = re.compile(r"(^|\.)(lm_head|embed_out|output)\.(weight|qweight|weight_packed)$")


def is_embedding_model(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint was published to make embeddings."""
    return stands_there(checkpoint.path / MODULES)


def default_functions(checkpoint: Checkpoint) -> tuple[str, ...]:
    """What the checkpoint is for: @step, unless it is an embedding model; that has @step too where it has a head."""
    if not is_embedding_model(checkpoint):
        return (STEP,)
    return (STEP, EMBED) if _has_head(checkpoint) else (EMBED,)


def _has_head(checkpoint: Checkpoint) -> bool:
    """Whether its class has one, and it is stored or said to be the embedding table."""
    named = checkpoint.config.get("architectures")
    if not isinstance(named, list) or not named or str(named[0]).endswith("Model"):
        return False
    tied = checkpoint.config.get("tie_word_embeddings") is True
    return tied or any(_HEADS.search(name) for name in checkpoint.tensors)


def embedding_files(root: Path) -> list[str]:
    """The files that say how to pool, relative to the checkpoint: those that are read, there or not."""
    if not stands_there(root / MODULES):
        return [MODULES]
    folder = next((path for kind, path in _modules(root) if kind == "Pooling"), None)
    return [MODULES, *([] if folder is None else [f"{folder}/config.json"]), _TEXTS, _PROMPTS]


def pooling_of(checkpoint: Checkpoint) -> tuple[Pooling, list[str]]:
    """How the checkpoint's hidden states become embeddings, and what the user should know of it. A checkpoint that says
    nothing: the last token's, normalized. Raises XllmError("unsupported" | "checkpoint")."""
    root = checkpoint.path
    dimensions = _dimensions(checkpoint)
    if not is_embedding_model(checkpoint):
        note = "the checkpoint says nothing of pooling: an embedding is the last token's hidden state, normalized"
        return Pooling("last", True, dimensions), [note]
    modules = _modules(root)
    kinds = [kind for kind, _ in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise XllmError(
            "unsupported",
            f"modules.json lists {', '.join(kinds) or 'nothing'}; known are Transformer, Pooling and then Normalize",
            where=str(root / MODULES),
        )
    if modules[0][1]:
        raise XllmError(
            "unsupported",
            f"the model itself is in the folder {modules[0][1]!r}",
            where=str(root / MODULES),
            help="put its files beside modules.json",
        )
    kind = _mode(root / modules[1][1] / "config.json")
    return Pooling(kind, len(kinds) == 3, dimensions), _texts(root)


def _modules(root: Path) -> list[tuple[str, str]]:
    """Class and folder of each module."""
    where = root / MODULES
    try:
        text = read_regular(where, MAX_JSON_BYTES).decode()
    except UnicodeDecodeError as error:
        raise damaged(f"{MODULES} is not UTF-8 text: {error.reason} at byte {error.start}", where) from None
    listed = parse_json(text, where, MODULES)
    out = []
    for item in listed if isinstance(listed, list) else [None]:
        kind, path = (item.get("type"), item.get("path")) if isinstance(item, dict) else (None, None)
        if not isinstance(kind, str) or not isinstance(path, str):
            raise damaged(f"{MODULES} is not a list of modules with `type` and `path`", where)
        if path and not _FOLDER.match(path):
            raise damaged(f"{MODULES} names {path[:80]!r}, which is no folder of the checkpoint", where)
        out.append((kind.rpartition(".")[2], path))
    return out


def _mode(where: Path) -> str:
    """The pooling of a config.json of sentence-transformers' Pooling."""
    config = read_json(where)
    chosen = [
        key.removeprefix("pooling_mode_") for key, value in config.items() if key.startswith("pooling_mode_") and value
    ]
    kinds = [_MODES.get(name) for name in chosen]
    if "pooling_mode" in config:
        named = config["pooling_mode"]
        chosen = [str(name) for name in (named if isinstance(named, list) else [named])]
        kinds = [_NAMES.get(name) for name in chosen]
    if len(kinds) != 1 or kinds[0] is None:
        raise XllmError(
            "unsupported",
            f"the checkpoint pools by {' and '.join(chosen)[:200] or 'nothing'}",
            where=str(where),
            help="the last token, the mean of all and the first token (cls) are known, one at a time",
        )
    return kinds[0]


def _texts(root: Path) -> list[str]:
    """Notes on what sentence-transformers would do to a text and we do not."""
    notes = []
    settings: dict[str, Any] = read_json(root / _TEXTS) if stands_there(root / _TEXTS) else {}
    if settings.get("do_lower_case"):
        raise XllmError("unsupported", "texts have to be in lower case (do_lower_case)", where=str(root / _TEXTS))
    prompts: dict[str, Any] = read_json(root / _PROMPTS) if stands_there(root / _PROMPTS) else {}
    named = prompts.get("prompts")
    listed = [str(name)[:40] for name, text in named.items() if text] if isinstance(named, dict) else []
    if listed:
        notes.append(
            f"the checkpoint has prompts ({', '.join(listed[:8])}) in {_PROMPTS}: clients put them before their texts, "
            "nothing is added here"
        )
    return notes


def _dimensions(checkpoint: Checkpoint) -> tuple[int, ...] | None:
    """The sizes that an embedding may be cut to, by config.json; () for any, None for none."""
    listed = checkpoint.config.get("matryoshka_dimensions")
    if listed is None:
        return () if checkpoint.config.get("is_matryoshka") is True else None
    sound = isinstance(listed, list) and listed and all(type(size) is int and size > 0 for size in listed)
    if not sound:
        raise damaged(
            f"matryoshka_dimensions is {listed!r}, not a list of sizes"[:200], checkpoint.path / "config.json"
        )
    return tuple(sorted(set(listed)))
