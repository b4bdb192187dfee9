"""The checkpoint's tokenizer: checked where it is a tokenizer.json, made into one from older forms of vocabulary.
Owns the calls into tokenizers and transformers."""

from __future__ import annotations

from pathlib import Path

from xllm_compiler.errors import XllmError


def check_tokenizer(path: Path) -> None:
    """Raises kind "checkpoint" unless the tokenizer.json at `path` can be read; a server would only fail later."""
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust side has no narrower type
        reason = " ".join(str(error).split())[:300]
        raise XllmError(
            "checkpoint", f"tokenizer.json cannot be read: {reason}", where=str(path), help="download the file again"
        ) from None


def convert_tokenizer(checkpoint: Path) -> str:
    """The text of a tokenizer.json made from the checkpoint's vocabulary files (sentencepiece, BPE merges).
    Raises kind "unsupported" when transformers has no fast form of that tokenizer. Never runs the checkpoint's code."""
    from transformers import AutoTokenizer

    help_ = "save the tokenizer with a fast tokenizer class, so that the checkpoint has a tokenizer.json"
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(checkpoint), trust_remote_code=False, local_files_only=True)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        text = None if backend is None else backend.to_str()
    except Exception as error:  # whatever a third party's parser meets in a damaged file
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise XllmError(
            "unsupported", f"transformers cannot read the tokenizer: {reason}", where=str(checkpoint), help=help_
        ) from error
    if not isinstance(text, str):
        raise XllmError("unsupported", "the tokenizer has no fast form", where=str(checkpoint), help=help_)
    return text
