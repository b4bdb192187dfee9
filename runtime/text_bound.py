"""How many characters one token can stand for, read off the parts of a tokenizer.

A text with more characters than that, times the model's length, cannot fit. It is refused before it is tokenized. There
is no bound where a part may drop text, or turn any run of it into one token.
"""

from __future__ import annotations

import json
from typing import Any

import tokenizers

_COMPOSED = 4  # code points that Unicode's normal forms make one of, at most
_KEEPS_ALL = frozenset(("ByteLevel", "Metaspace", "Digits", "UnicodeScripts", "FixedLength"))
_SLICE = 4096


def characters_per_token(core: tokenizers.Tokenizer) -> int | None:
    """The most characters of a text for one token, or None when there is no such bound."""
    shrink = _normalizer(_state(core.normalizer))
    if shrink is None or not _pre_tokenizer(_state(core.pre_tokenizer)) or not _model(core):
        return None
    added = core.get_added_tokens_decoder().values()
    if any(token.lstrip or token.rstrip for token in added):  # these swallow the spaces beside them
        return None
    longest = max((len(token.content) for token in added), default=1)
    for start in range(0, core.get_vocab_size(), _SLICE):
        names = map(core.id_to_token, range(start, start + _SLICE))
        longest = max(longest, max(len(name or "") for name in names))
    return shrink * longest


def _state(part: Any) -> dict[str, Any] | None:
    return None if part is None else dict(json.loads(part.__getstate__()))


def _normalizer(state: dict[str, Any] | None) -> int | None:
    """How many characters it makes one of, at most; None for any number."""
    if state is None:
        return 1
    kind = state.get("type")
    if kind == "Sequence":
        product = 1
        for part in state["normalizers"]:
            factor = _normalizer(part)
            if factor is None:
                return None
            product *= factor
        return product
    if kind in ("NFC", "NFKC"):
        return _COMPOSED
    if kind in ("NFD", "NFKD", "Prepend", "ByteLevel", "Lowercase"):
        return 1
    if kind == "Replace":
        pattern = state.get("pattern", {}).get("String")
        if pattern and state.get("content"):
            return -(-len(pattern) // len(state["content"]))
    return None


def _pre_tokenizer(state: dict[str, Any] | None) -> bool:
    """Whether it drops nothing."""
    if state is None:
        return True
    kind = state.get("type")
    if kind == "Sequence":
        return all(_pre_tokenizer(part) for part in state["pretokenizers"])
    if kind in ("Split", "Punctuation", "CharDelimiterSplit"):
        return kind != "CharDelimiterSplit" and state.get("behavior") != "Removed"
    return kind in _KEEPS_ALL


def _model(core: tokenizers.Tokenizer) -> bool:
    """Whether every character ends up in a token, and no run of unknown ones in a single token."""
    model = core.model
    if isinstance(model, tokenizers.models.BPE):
        if model.byte_fallback:
            return all(core.token_to_id(f"<0x{byte:02X}>") is not None for byte in range(256))
        if model.unk_token is not None and not model.fuse_unk:
            return True
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        return _byte_level(core) and all(core.token_to_id(char) is not None for char in alphabet)
    return False  # WordPiece and WordLevel melt long words, Unigram melts runs


def _byte_level(core: tokenizers.Tokenizer) -> bool:
    def within(state: dict[str, Any] | None) -> bool:
        if state is None:
            return False
        parts = [*state.get("pretokenizers", ()), *state.get("normalizers", ())]
        return state.get("type") == "ByteLevel" or any(within(part) for part in parts)

    return within(_state(core.pre_tokenizer)) or within(_state(core.normalizer))
