"""How much text a token can stand for, against what tokenizers do with adversarial texts."""

from __future__ import annotations

import random
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from xllm_compiler.runtime.text_bound import characters_per_token

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level(*, normalizer: Any = None, split: Any = None, added: Any = None) -> tokenizers.Tokenizer:
    names = [*ALPHABET, "aa", "aaaa", "ĠĠ", "ĠĠĠĠ"]
    merges = [("a", "a"), ("aa", "aa"), ("Ġ", "Ġ"), ("ĠĠ", "ĠĠ")]
    core = tokenizers.Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=merges))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.pre_tokenizer = level if split is None else pre_tokenizers.Sequence([split, level])
    core.decoder = decoders.ByteLevel()
    if normalizer is not None:
        core.normalizer = normalizer
    if added is not None:
        core.add_tokens([added])
    return core


def byte_fallback(**options: Any) -> tokenizers.Tokenizer:
    names = ["<unk>", *BYTES, "a", "aa", "\u2581", "\u2581\u2581"]
    merges = [("a", "a"), ("\u2581", "\u2581")]
    vocab = {name: i for i, name in enumerate(names)}
    core = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    core.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    return core


def word(model: Any) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer(model)


BOUNDED = {
    "bytes": (byte_level(), 4),
    "bytes, composed": (byte_level(normalizer=normalizers.NFC()), 16),
    "bytes, split": (byte_level(split=pre_tokenizers.Split(Regex(r"\s+"), "isolated")), 4),
    "bytes, two spaces to one": (byte_level(normalizer=normalizers.Replace("  ", " ")), 8),
    "bytes, a long added token": (byte_level(added=AddedToken("<|a long one|>")), 14),
    "fallback to bytes": (byte_fallback(), 6),
}
UNBOUNDED = {
    "strip": byte_level(normalizer=normalizers.Strip()),
    "runs of spaces": byte_level(normalizer=normalizers.Replace(Regex(" +"), " ")),
    "dropped": byte_level(normalizer=normalizers.Replace("a", "")),
    "a split that drops": byte_level(split=pre_tokenizers.Split(" ", "removed")),
    "an added token that swallows spaces": byte_level(added=AddedToken("<x>", lstrip=True)),
    "words": word(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")),
    "word pieces": word(models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]")),
    "unigram": word(models.Unigram([("a", -1.0), ("<unk>", -2.0)], unk_id=1)),
    "unknown characters in one": word(models.BPE({"a": 0, "<unk>": 1}, [], unk_token="<unk>", fuse_unk=True)),
    "unknown characters in none": word(models.BPE({"a": 0}, [])),
}


@pytest.mark.parametrize(("core", "most"), BOUNDED.values(), ids=BOUNDED)
def test_no_text_has_more_characters_for_a_token(core: tokenizers.Tokenizer, most: int) -> None:
    assert characters_per_token(core) == most
    source = random.Random(0)
    pieces = [
        "a",
        "aaaa",
        " ",
        "    ",
        "e\u0301",
        "\u03c9\u0313\u0301\u0345",
        "\U0001f600",
        "<|a long one|>",
        "\n",
        "\0",
        "Q",
    ]
    texts = ["".join(source.choices(pieces, k=source.randrange(1, 60))) for _ in range(300)]
    for text in [*texts, *(piece * 1000 for piece in pieces)]:
        assert len(text) <= most * len(core.encode(text, add_special_tokens=False).ids)


@pytest.mark.parametrize("core", UNBOUNDED.values(), ids=UNBOUNDED)
def test_where_text_may_vanish_there_is_no_bound(core: tokenizers.Tokenizer) -> None:
    assert characters_per_token(core) is None
