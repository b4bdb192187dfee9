"""A tokenizer, in the child: reads one and encodes texts. Must not import anything of this project."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import tokenizers

_loaded: list[tokenizers.Tokenizer] = []


def load(text: str) -> int:
    """Read a tokenizer.json; its number of tokens."""
    _loaded[:] = [tokenizers.Tokenizer.from_str(text)]
    return int(_loaded[0].get_vocab_size())


def encode(text: str) -> int:
    """How many tokens a text has."""
    return len(_loaded[0].encode(text, add_special_tokens=False).ids)


CALLS: Mapping[str, Callable[[Any], Any]] = {"load": load, "encode": encode}
