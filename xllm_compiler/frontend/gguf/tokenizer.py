"""The tokenizer that the metadata of a GGUF file describes. transformers makes it; what it is given is checked here."""

from __future__ import annotations

from typing import Any, Final

from xllm_compiler.errors import XllmError
from xllm_compiler.frontend.files import damaged
from xllm_compiler.frontend.gguf.file import ARCHITECTURE, GgufFile
from xllm_compiler.frontend.tokenizer import ResolvedTokenizer, checked, is_fault, quiet, reason_of

_BYTE_LEVEL: Final = "gpt2"
_KINDS: Final = (_BYTE_LEVEL, "llama")
"""Byte-level BPE, and SentencePiece's."""

_PLAIN: Final = ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone", "exaone4")
"""Vocabularies that were learned on GPT-2's words, of `tokenizer.ggml.pre`."""
_SINGLE_DIGITS: Final = ("smollm", "starcoder", "refact", "command-r", "codeshell")
"""On the same, with each digit a word."""

_NAMED: Final = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}
_ADDED: Final = ("add_bos_token", "add_eos_token")


def resolve_gguf_tokenizer(file: GgufFile) -> ResolvedTokenizer | None:
    """None where the file has no vocabulary. Raises XllmError: "checkpoint" for one that makes no sense, "unsupported"
    for a kind that is not known."""
    kind = _of(file, "model", str)
    if kind is None or kind == "no_vocab":
        return None
    if kind not in _KINDS:
        raise XllmError(
            "unsupported",
            f"the tokenizer of {file.path.name} is of the kind {kind[:40]!r}",
            where=str(file.path),
            help="byte-level BPE (gpt2) and SentencePiece's (llama) can be read; or take the Hugging Face form",
        )
    described = _described(file, kind)
    settings = _settings(file, kind, described["tokens"])
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf import convert_gguf_tokenizer

    try:
        with quiet():
            backend, _ = convert_gguf_tokenizer(file.metadata[ARCHITECTURE], described)
            notes = _split(backend, described, kind)
            loaded = PreTrainedTokenizerFast(tokenizer_object=backend, **settings)
    except BaseException as error:  # whatever a third party's code meets in a strange vocabulary
        if not is_fault(error):
            raise
        raise damaged(f"transformers cannot make the tokenizer: {reason_of(error)}", file.path) from None
    found = checked(loaded, file.path)
    return ResolvedTokenizer(found.tokenizer, found.config, found.eos, found.size, (*notes, *found.notes))


def _of(file: GgufFile, key: str, kind: type, inner: type | None = None) -> Any:
    """The value of tokenizer.ggml.`key`, None where there is none."""
    value: Any = file.metadata.get(f"tokenizer.ggml.{key}")
    kinds = {type(item) for item in (value if isinstance(value, list) else ())}
    if value is not None and (type(value) is not kind or not kinds <= {inner}):
        raise damaged(f"tokenizer.ggml.{key} is {str(value)[:80]}, not what it should be", file.path)
    return value


def _described(file: GgufFile, kind: str) -> dict[str, Any]:
    """The vocabulary in transformers' terms, with lists that fit together."""
    tokens = _of(file, "tokens", list, str)
    if not tokens:
        raise damaged("the tokenizer has no tokens", file.path)
    if len(set(tokens)) < len(tokens):
        raise damaged("the tokenizer has a token twice", file.path)
    found = {"tokenizer_type": kind, "pre_tokenizer_type": _of(file, "pre", str), "tokens": tokens}
    kinds = _of(file, "token_type", list, int)
    scores = _of(file, "scores", list, float)
    merges = _of(file, "merges", list, str)
    for name, of_each in (("token_type", kinds), ("scores", scores)):
        if of_each is not None and len(of_each) != len(tokens):
            raise damaged(f"tokenizer.ggml.{name} speaks of {len(of_each)} tokens, there are {len(tokens)}", file.path)
    if merges is None and (kind == _BYTE_LEVEL or scores is None):
        needed = "merges" if kind == _BYTE_LEVEL else "scores"
        raise damaged(f"tokenizer.ggml.{needed} is missing", file.path)
    if merges is not None:
        bad = next((merge for merge in merges if len(merge.split(" ")) != 2), None)
        if bad is not None:
            raise damaged(f"tokenizer.ggml.merges has {bad[:80]!r}, which is no pair", file.path)
    found |= {"token_type": kinds, "scores": scores, "merges": merges}
    return {key: value for key, value in found.items() if value is not None}


def _settings(file: GgufFile, kind: str, tokens: list[str]) -> dict[str, Any]:
    """Special tokens, what is added to a text, and the chat template."""
    settings: dict[str, Any] = {}
    for name, key in _NAMED.items():
        number = _of(file, key, int)
        if number is not None:
            if not 0 <= number < len(tokens):
                raise damaged(f"tokenizer.ggml.{key} is {number}, there are {len(tokens)} tokens", file.path)
            settings[f"{name}_token"] = tokens[number]
    for name in _ADDED:
        value = _of(file, name, bool)
        settings[name] = value if value is not None else name == _ADDED[0] and kind != _BYTE_LEVEL
    templates = _templates(file)
    if templates:
        settings["chat_template"] = templates["default"] if list(templates) == ["default"] else templates
    return settings


def _templates(file: GgufFile) -> dict[str, str]:
    """Chat templates by name: the file's own is "default"."""
    start = "tokenizer.chat_template"
    found = {key: text for key, text in file.metadata.items() if key == start or key.startswith(f"{start}.")}
    for key, text in found.items():
        if not isinstance(text, str):
            raise damaged(f"{key} is no text", file.path)
    return {key.removeprefix(start).removeprefix(".") or "default": text for key, text in found.items() if text}


def _split(backend: Any, described: dict[str, Any], kind: str) -> list[str]:
    """How a byte-level vocabulary wants a text cut into words, where transformers does not know it."""
    from tokenizers import pre_tokenizers
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    named = described.get("pre_tokenizer_type")
    if kind != _BYTE_LEVEL or named in GGUF_PRE_TOKENIZER_SPLITS or named in _PLAIN:
        return []
    if named in _SINGLE_DIGITS:
        words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
        return []
    told = "the file does not say how its tokenizer cuts" if named is None else f"how {str(named)[:40]!r} cuts"
    known = "" if named is None else " is not known"
    return [f"{told} a text into words{known}: it is cut as for GPT-2, as transformers does"]
