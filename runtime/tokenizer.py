"""Text to tokens and back. Owns what the artifact's tokenizer files mean; must not know requests or sampling."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers

from xllm_compiler.errors import XllmError
from xllm_compiler.runtime.text_bound import characters_per_token

if TYPE_CHECKING:
    from xllm_compiler.runtime.chat_template import ChatTemplate

# The library would hand batches to threads of its own, which nobody can make nicer than the ones that compute.
os.environ["TOKENIZERS_PARALLELISM"] = "false"
Message = Mapping[str, Any]


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object; {} when there is no such file. Raises XllmError("artifact") or ("io")."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise XllmError("io", f"cannot read {path.name}: {error.strerror}", where=str(path)) from None
    except ValueError as error:
        raise XllmError("artifact", f"{path.name} is not JSON: {error}", where=str(path)) from None
    if not isinstance(value, dict):
        raise XllmError("artifact", f"{path.name} holds no JSON object", where=str(path))
    return value


class Tokenizer:
    """A Hugging Face fast tokenizer with its chat template. Safe to use from several threads."""

    def __init__(self, core: tokenizers.Tokenizer, config: Mapping[str, Any], template: ChatTemplate | None) -> None:
        """`config` is tokenizer_config.json; its special tokens are visible to the chat template."""
        self._core = core
        self._template = template
        self._special = {name: text for name, text in _special_tokens(config)}
        self._texts: dict[int, str] = {}

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read tokenizer.json, tokenizer_config.json and chat_template.jinja of an artifact or a checkpoint."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise XllmError("artifact", "there is no tokenizer.json", where=str(folder))
        try:
            core = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the binding raises bare Exception
            raise XllmError("artifact", f"tokenizer.json cannot be read: {error}", where=str(path)) from None
        core.no_padding()
        core.no_truncation()
        config = read_json_object(folder / "tokenizer_config.json")
        try:
            text = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        except FileNotFoundError:
            template = config.get("chat_template")
        else:
            template = text
        if not template:
            return cls(core, config, None)
        return cls(core, config, _template(template))

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

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Raises XllmError("request") when the text cannot be encoded."""
        return list(self.encoding(text, add_special_tokens).ids)

    def encoding(self, text: str, add_special_tokens: bool = True) -> tokenizers.Encoding:
        """The same, before a list is made of it: other threads run meanwhile, unlike in the binding's `encode`."""
        try:
            return self._core.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0]
        except Exception as error:  # lone surrogates and the like; the binding raises bare exceptions
            raise XllmError("request", f"the text cannot be tokenized: {error}", where="prompt") from None

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; an id without a name adds nothing. Raises XllmError("request") for one out of range."""
        try:
            # A batch of one: other threads run meanwhile, unlike in the binding's `decode`.
            return str(self._core.decode_batch([list(ids)], skip_special_tokens=skip_special_tokens)[0])
        except OverflowError:
            raise XllmError("request", "token ids must be from 0 to 4294967295", where="tokens") from None

    def token_text(self, token: int) -> str:
        """One token on its own as text, special ones too; part of a character shows as U+FFFD."""
        text = self._texts.get(token)
        if text is None:
            text = self._texts[token] = self.decode([token], skip_special_tokens=False)
        return text

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
        chat_template: str | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as the template writes it. `variables`: what else it sees, under any names. Raises
        XllmError("request")."""
        template = self._template if chat_template is None else _template(chat_template)
        if template is None:
            raise XllmError(
                "request",
                "this model has no chat template",
                where="messages",
                help="use /v1/completions or give the server a --chat-template",
            )
        return template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables={**self._special, **(variables or {})},
        )


def _template(text: str) -> ChatTemplate:
    """jinja takes a sixth of the time in which this process starts: only whoever has a template waits for it."""
    from xllm_compiler.runtime.chat_template import ChatTemplate

    return ChatTemplate(text)


def _special_tokens(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for name in ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"):
        value = config.get(name)
        if isinstance(value, Mapping):  # a serialised AddedToken
            value = value.get("content")
        if isinstance(value, str):
            found.append((name, value))
    return found
