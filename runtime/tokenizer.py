"""Text to tokens and back. Owns what the artifact's tokenizer files mean; must not know requests or sampling."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from xllm_compiler.artifact import Contents
from xllm_compiler.artifact.strict_json import parse_json
from xllm_compiler.errors import XllmError
from xllm_compiler.runtime.chat_template import ChatTemplate, Message
from xllm_compiler.runtime.text_bound import characters_per_token

# The library would hand batches to threads of its own, which nobody can make nicer than the ones that compute.
os.environ["TOKENIZERS_PARALLELISM"] = "false"
_ANCHORS_TRIED = 4096
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


def _byte_letters() -> dict[str, int]:
    """GPT-2's letters for bytes, by which byte-level tokens are named: printable ones stand for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_letters()


def read_json_object(path: Path | Contents) -> dict[str, Any]:
    """A JSON file that holds an object; {} when there is no such file. Raises XllmError("artifact") or ("io")."""
    try:
        value = parse_json(path.read_bytes(), path.name)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise XllmError("io", f"cannot read {path.name}: {error.strerror}", where=str(path)) from None
    if not isinstance(value, dict):
        raise XllmError("artifact", f"{path.name} holds no JSON object", where=str(path))
    return value


class Tokenizer:
    """A Hugging Face fast tokenizer with its chat template. Safe to use from several threads."""

    def __init__(self, core: tokenizers.Tokenizer, config: Mapping[str, Any], template: ChatTemplate | None) -> None:
        """`config`: the artifact's tokenizer_config.json; its special tokens are visible to the chat template."""
        self._core = core
        self._template = template
        self._special = _special_tokens(config)
        added = core.get_added_tokens_decoder()
        self._added = frozenset(added)
        self._special_names = {int(token): str(entry.content) for token, entry in added.items() if entry.special}
        decoder = b"" if core.decoder is None else bytes(core.decoder.__getstate__())
        self._byte_level = b'"ByteLevel"' in decoder
        self._byte_fallback = b'"ByteFallback"' in decoder
        self._strips = b'"Strip"' in decoder or b'"Metaspace"' in decoder
        self._anchor = self._find_anchor()
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def load(cls, folder: Path | Contents) -> Tokenizer:
        """Read an artifact's tokenizer.json and tokenizer_config.json.

        The compiler wrote all there is to know into them: special tokens by name, chat templates, and whether special
        tokens in a text are split.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise XllmError("artifact", "there is no tokenizer.json", where=str(folder))
        try:
            core = tokenizers.Tokenizer.from_buffer(path.read_bytes())
        except BaseException as error:  # the binding raises bare Exception, and a panic is not even that
            if not _is_fault(error):
                raise
            raise XllmError("artifact", f"tokenizer.json cannot be read: {error}", where=str(path)) from None
        core.no_padding()
        core.no_truncation()
        config = read_json_object(folder / "tokenizer_config.json")
        core.encode_special_tokens = config.get("split_special_tokens") is True
        template = config.get("chat_template")
        return cls(core, config, ChatTemplate(template, _special_tokens(config)) if template else None)

    @property
    def vocab_size(self) -> int:
        """Tokens that have a name, added ones included; may be less than the model's rows of logits."""
        return int(self._core.get_vocab_size(with_added_tokens=True))

    @functools.cached_property
    def characters_per_token(self) -> int | None:
        """The most characters of a text that a token can stand for; None when there is no bound. Slow at first."""
        return characters_per_token(self._core)

    @property
    def special_tokens(self) -> dict[str, str]:
        """bos_token, eos_token, ... as tokenizer_config.json names them."""
        return dict(self._special)

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    @property
    def chat_template(self) -> ChatTemplate:
        """The model's own. Raises XllmError("request") when it has none."""
        if self._template is None:
            raise XllmError(
                "request",
                "this model has no chat template",
                where="messages",
                help="use /v1/completions or give the server a --chat-template",
            )
        return self._template

    def _find_anchor(self) -> int | None:
        """A plain word, after which another token is decoded as it is within a text."""
        for token in range(min(self.vocab_size, _ANCHORS_TRIED)):
            if token not in self._added and self._core.id_to_token(token) is not None:
                text = self.decode([token], skip_special_tokens=False)
                if text.isascii() and text.isalnum():
                    return token
        return None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Raises XllmError("request") when the text cannot be encoded."""
        return list(self.encoding(text, add_special_tokens).ids)

    def encoding(self, text: str, add_special_tokens: bool = True) -> tokenizers.Encoding:
        """As `encode`, without making the list. Other threads run meanwhile, which the binding's `encode` prevents."""
        try:
            return self._core.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0]
        except BaseException as error:  # lone surrogates, a pattern that gives up: bare exceptions and panics
            if not _is_fault(error):
                raise
            raise XllmError("request", f"the text cannot be tokenized: {error}", where="prompt") from None

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; an id without a name adds nothing. Raises XllmError("request") for one out of range."""
        try:
            # A batch of one: other threads run meanwhile, unlike in the binding's `decode`.
            return str(self._core.decode_batch([list(ids)], skip_special_tokens=skip_special_tokens)[0])
        except OverflowError:
            raise XllmError("request", "token ids must be from 0 to 4294967295", where="tokens") from None

    def special_name(self, token: int) -> str | None:
        """The name of a special token, None for others."""
        return self._special_names.get(token)

    def token_bytes(self, token: int) -> bytes:
        """What the token writes within a text, half a character included; nothing for an id without a name."""
        found = self._bytes.get(token)
        if found is None:
            found = self._bytes[token] = self._bytes_of(token)
        return found

    @property
    def context(self) -> tuple[int, ...]:
        """Tokens to decode before others whose first space must stay, where the start of a text would lose it."""
        return () if self._anchor is None or not self._strips else (self._anchor,)

    def decode_within(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids as it reads within a longer text."""
        known = self.decode(self.context, skip_special_tokens)
        return self.decode([*self.context, *ids], skip_special_tokens)[len(known) :]

    def _bytes_of(self, token: int) -> bytes:
        name = self.id_to_token(token)
        if name is None:
            return b""
        if token not in self._added:
            if self._byte_level and all(letter in _BYTE_OF for letter in name):
                return bytes(_BYTE_OF[letter] for letter in name)
            if self._byte_fallback and (byte := _BYTE_TOKEN.fullmatch(name)):
                return bytes.fromhex(byte[1])
        before = [] if self._anchor is None else [self._anchor]
        known = self.decode(before, skip_special_tokens=False) if before else ""
        return self.decode([*before, token], skip_special_tokens=False)[len(known) :].encode("utf-8", "replace")

    def spans(self, text: str, add_special_tokens: bool) -> list[int]:
        """Where each token of `encode`'s answer begins in the text, in characters."""
        starts, last = [], 0
        (encoding,) = self._core.encode_batch([text], add_special_tokens=add_special_tokens)
        for start, end in encoding.offsets:
            last = max(last, start) if end > start else last
            starts.append(last)
        return starts

    def token_id(self, text: str) -> int | None:
        found = self._core.token_to_id(text)
        return None if found is None else int(found)

    def id_to_token(self, token: int) -> str | None:
        """The token's name in the vocabulary ("Ġthe" for " the")."""
        found = self._core.id_to_token(token)
        return None if found is None else str(found)

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as the template writes it; `variables` are seen by the template beside the special tokens,
        under any names. Raises XllmError("request")."""
        return self.chat_template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables={**self._special, **(variables or {})},
        )


def _is_fault(error: BaseException) -> bool:
    """Whether the binding failed, by an exception or by a panic of Rust, rather than this process being ended."""
    return not isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit))


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token and whatever else is named so; not add_bos_token, which is no text."""
    found: dict[str, str] = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, Mapping) else value  # a serialised AddedToken
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found
