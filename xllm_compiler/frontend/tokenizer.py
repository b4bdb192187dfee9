"""The checkpoint's tokenizer as transformers resolves it, written down in one form. Owns the calls into transformers
and tokenizers; what the result must satisfy is `tokenizer_check`.

A checkpoint's tokenizer is spread over many files, and over the defaults of a class: which tokens are special, what is
added to a text, which token ends one. `AutoTokenizer` knows; the artifact gets what it made of them, a tokenizer.json
and a tokenizer_config.json that say everything. The checkpoint's own code is never run.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xllm_compiler.errors import XllmError

_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".vocab", ".spm", ".bpe")
_MORE_TEMPLATES = "additional_chat_templates"
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "vocab.bpe", "tekken.json")
_RESAVE = "save the tokenizer with a fast tokenizer class, so that the checkpoint has a tokenizer.json"


@dataclass(frozen=True)
class ResolvedTokenizer:
    """The texts of the artifact's tokenizer.json and tokenizer_config.json; `eos` is the id of eos_token."""

    tokenizer: str
    config: str
    eos: int | None
    size: int  # one more than the largest id
    notes: tuple[str, ...] = field(default=())


def tokenizer_files(root: Path) -> list[str]:
    """Names of the files from which transformers may make the tokenizer: which ones it reads depends on its class, so
    all of their kind, whether they can be read or not."""
    found = []
    for folder, prefix in ((root, ""), (root / _MORE_TEMPLATES, f"{_MORE_TEMPLATES}/")):
        try:
            names = sorted(os.listdir(folder))
        except OSError:
            continue
        for name in names:
            if name.endswith(_SUFFIXES) or ".model." in name:
                found.append(prefix + name)
    return found


def _vocabularies(root: Path) -> list[str]:
    names = [name for name in tokenizer_files(root) if "/" not in name]
    return [n for n in names if n in _VOCABULARIES or n.endswith((".model", ".tiktoken", ".spm")) or ".model." in n]


def resolve_tokenizer(root: Path) -> ResolvedTokenizer | None:
    """What transformers makes of the tokenizer files in `root`; None when there is no vocabulary among them.

    Raises XllmError: "checkpoint" for damaged files, "unsupported" where there is no fast form of that tokenizer, or
    only code of the checkpoint's own would make one.
    """
    files = _vocabularies(root)
    if not files:
        return None
    alone = root / "tokenizer.json" if "tokenizer.json" in files else None
    if alone is not None:
        _check_readable(alone)
    with quiet():
        loaded = _load(root, files)
    return checked(loaded, root, alone)


def checked(loaded: Any, root: Path, alone: Path | None = None) -> ResolvedTokenizer:
    """What is served of transformers' tokenizer `loaded`, after it has proved itself. `root`: what to blame. `alone`:
    the checkpoint's tokenizer.json, if it has one. Raises XllmError("checkpoint" | "unsupported")."""
    from xllm_compiler.frontend.template_check import check_template
    from xllm_compiler.frontend.tokenizer_check import check_encodes, check_same, note_rebuilt

    with quiet():
        served = _copy(_backend(loaded, root))
        config = _config(loaded, root)
    text = served.to_str(pretty=True)
    notes = check_encodes(text, str(root))
    with quiet():
        notes += check_same(loaded, served, str(root))
    if alone is not None:
        notes += note_rebuilt(loaded, served, alone)
    notes += check_template(config, str(root))
    eos = loaded.eos_token
    ids = served.get_vocab(with_added_tokens=True).values()
    return ResolvedTokenizer(
        text,
        json.dumps(config, indent=2, sort_keys=True) + "\n",
        None if eos is None else served.token_to_id(str(eos)),
        max(ids, default=-1) + 1,
        tuple(notes),
    )


@contextmanager
def quiet() -> Iterator[None]:
    """transformers' own warnings are for people who train."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def is_fault(error: BaseException) -> bool:
    """Whether a library failed, by an exception or by a panic of Rust, which is no Exception."""
    return not isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit))


def reason_of(error: BaseException) -> str:
    """An error's text in one line, at most 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _check_readable(path: Path) -> None:
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_file(str(path))
    except BaseException as error:
        if not is_fault(error):
            raise
        raise XllmError(
            "checkpoint",
            f"tokenizer.json cannot be read: {reason_of(error)}",
            where=str(path),
            help="download the file again",
        ) from None


def _load(root: Path, files: list[str]) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            str(root), trust_remote_code=False, local_files_only=True, mistral_format=False
        )
    except BaseException as error:  # whatever a third party's parser meets in a damaged file
        if not is_fault(error):
            raise
        raise _unreadable(root, files, error) from None


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _unreadable(root: Path, files: list[str], error: BaseException) -> XllmError:
    settings: object = None
    try:
        settings = json.loads((root / "tokenizer_config.json").read_bytes())
    except FileNotFoundError:
        pass
    except (OSError, ValueError, RecursionError) as fault:
        return XllmError(
            "checkpoint",
            f"tokenizer_config.json cannot be read: {reason_of(fault)}",
            where=str(root / "tokenizer_config.json"),
            help="download the file again",
        )
    if isinstance(settings, dict) and settings.get("auto_map") and "trust_remote_code" in str(error):
        return XllmError(
            "unsupported",
            f"the tokenizer class {settings.get('tokenizer_class')!r} is code that comes with the checkpoint, which is "
            "never run here",
            where=str(root / "tokenizer_config.json"),
            help=_RESAVE,
        )
    if isinstance(error, UnicodeDecodeError):
        for name in tokenizer_files(root):
            if not _is_utf8(root / name) and not (name.endswith(".model") or ".model." in name):
                return XllmError("checkpoint", f"{name} is not UTF-8 text: {error.reason}", where=str(root / name))
    missing = [name for name in ("sentencepiece", "google.protobuf") if not _installed(name)]
    if missing and not any(name in _VOCABULARIES for name in files):
        return XllmError(
            "unsupported",
            f"the tokenizer is {files[0]} alone, and converting it needs sentencepiece and protobuf",
            where=str(root),
            help="pip install 'xllm-compiler[compile]', or pip install sentencepiece protobuf",
        )
    return XllmError(
        "checkpoint", f"transformers cannot read the tokenizer: {reason_of(error)}", where=str(root), help=_RESAVE
    )


def _is_utf8(path: Path) -> bool:
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _backend(loaded: Any, root: Path) -> Any:
    """The tokenizer in the form that is served; a slow one is converted, and then has to prove itself."""
    from tokenizers import Tokenizer

    backend = getattr(loaded, "backend_tokenizer", None)
    if isinstance(backend, Tokenizer):
        return backend
    from transformers.convert_slow_tokenizer import convert_slow_tokenizer

    try:
        return convert_slow_tokenizer(loaded)
    except BaseException as error:
        if not is_fault(error):
            raise
        raise XllmError(
            "unsupported",
            f"the tokenizer {type(loaded).__name__} has no fast form: {reason_of(error)}",
            where=str(root),
            help=_RESAVE,
        ) from None


def _copy(backend: Any) -> Any:
    """Written and read again, without padding and truncation: this is what will be served."""
    from tokenizers import Tokenizer

    served = Tokenizer.from_str(backend.to_str())
    served.no_padding()
    served.no_truncation()
    served.encode_special_tokens = bool(backend.encode_special_tokens)  # no part of tokenizer.json
    return served


def _config(loaded: Any, root: Path) -> dict[str, Any]:
    config: dict[str, Any] = dict(loaded.special_tokens_map)
    more = [str(token) for token in getattr(loaded, "extra_special_tokens", None) or []]
    if more:
        config["extra_special_tokens"] = more
    if getattr(loaded, "split_special_tokens", False):
        config["split_special_tokens"] = True
    template = loaded.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": template[name]} for name in sorted(template)]
    if template:
        texts = [template] if isinstance(template, str) else [item["template"] for item in template]
        if not all(isinstance(text, str) for text in texts):
            raise XllmError("checkpoint", "the chat template is neither text nor named texts", where=str(root))
        config["chat_template"] = template
    return config
