"""What every endpoint needs, and the steps that chat and completions share before a prompt reaches the engine.

Owns model names, tokenizing off the loop, and prompt checks. Must not know response shapes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from xllm_compiler.runtime.chat_template import ChatTemplate
from xllm_compiler.runtime.facts import ModelFacts
from xllm_compiler.runtime.sampling_params import SamplingParams
from xllm_compiler.runtime.server.bridge import Bridge
from xllm_compiler.runtime.server.errors import ApiError, bad_request, unavailable
from xllm_compiler.runtime.server.metrics import Metrics
from xllm_compiler.runtime.server.params import fit_to_context

_INLINE_CHARACTERS = 4096  # tokenizing this much takes under a millisecond; more goes to a thread
# Names that a request may not bind in the chat template: they have their own fields, or none on purpose.
_TEMPLATE_OWN = frozenset(
    ("messages", "chat_template", "tools", "documents", "add_generation_prompt", "continue_final_message")
)


class TokenizerLike(Protocol):
    """What the server needs of `runtime.tokenizer.Tokenizer`."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...
    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...
    def token_text(self, token: int) -> str: ...
    def id_to_token(self, token: int) -> str | None: ...
    @property
    def special_tokens(self) -> dict[str, str]: ...
    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str: ...


@dataclass
class Context:
    """One server's parts. `health` says what is wrong with the engine, or nothing when all is well."""

    tokenizer: TokenizerLike
    facts: ModelFacts
    bridge: Bridge
    metrics: Metrics
    names: tuple[str, ...]
    defaults: Mapping[str, Any]
    health: Callable[[], str | None]
    version: str
    pool_tokens: int  # what the whole KV pool holds
    template: ChatTemplate | None = None  # instead of the tokenizer's own
    max_body_size: int = 4 * 2**20
    receive_timeout: float = 30.0
    retry_after: int = 5
    draining: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def name(self) -> str:
        return self.names[0]

    def check_model(self, name: str | None) -> str:
        """The name to answer with. Raises ApiError 404 for a model that is not served here."""
        if name is None:
            return self.name
        if name not in self.names:
            raise ApiError(
                404,
                f"The model `{name[:200]}` does not exist. This server has: {', '.join(self.names)}.",
                type="not_found_error",
                param="model",
                code="model_not_found",
            )
        return name

    def check_open(self) -> None:
        """Raises ApiError 503 while the server drains."""
        if self.draining:
            raise unavailable("the server is shutting down", code="draining", retry_after=self.retry_after)

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids; long texts are tokenized in a thread so that other streams keep flowing."""
        if len(text) <= _INLINE_CHARACTERS:
            return self.tokenizer.encode(text, add_special_tokens)
        return await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens)

    def check_token_ids(self, ids: Sequence[int], field: str) -> None:
        """Raises ApiError 400 for ids that the model does not have."""
        if ids and (min(ids) < 0 or max(ids) >= self.facts.vocab_size):
            wrong = next(i for i in ids if not 0 <= i < self.facts.vocab_size)
            raise bad_request(
                f"token id {wrong if abs(wrong) < 10**18 else 'with more than 18 digits'} is not within the vocabulary "
                f"[0, {self.facts.vocab_size})",
                param=field,
            )

    def fit(self, params: SamplingParams, prompt_tokens: int, *, explicit: bool, field: str) -> None:
        """`fit_to_context` with this server's sizes."""
        fit_to_context(
            params, prompt_tokens, self.facts.max_model_len, self.pool_tokens, explicit=explicit, field=field
        )

    def truncate(self, ids: list[int], limit: int | None) -> list[int]:
        """The last `limit` tokens; -1 means as many as the model takes beside one new token."""
        if limit is None:
            return ids
        if limit == -1:
            limit = self.facts.max_model_len - 1
        if limit < 1:
            raise bad_request(
                f"truncate_prompt_tokens must be -1 or at least 1, got {limit}", param="truncate_prompt_tokens"
            )
        return ids[-limit:]

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool | None,
        continue_final_message: bool | None,
        kwargs: Mapping[str, Any] | None,
    ) -> str:
        """The conversation as the model's template writes it. Raises ApiError or XllmError("request")."""
        for name in kwargs or ():
            if name in _TEMPLATE_OWN:
                raise bad_request(f"`chat_template_kwargs` may not set `{name}`", param="chat_template_kwargs")
        proceed = bool(continue_final_message)
        chat = [_message(message, index) for index, message in enumerate(messages)]
        prompt = not proceed if add_generation_prompt is None else add_generation_prompt
        variables = dict(kwargs or {})
        if self.template is not None:
            variables = {**self.tokenizer.special_tokens, **variables}
            return self.template.render(
                chat, add_generation_prompt=prompt, continue_final_message=proceed, variables=variables
            )
        return self.tokenizer.render_chat(
            chat, add_generation_prompt=prompt, continue_final_message=proceed, variables=variables
        )


_MESSAGE_OFF = ("tool_calls", "tool_call_id", "function_call", "audio")
_MESSAGE_KNOWN = frozenset(("role", "content", "name", "refusal", "annotations", "reasoning", "reasoning_content"))


def _message(message: Mapping[str, Any], index: int) -> dict[str, Any]:
    """A checked message with its text parts joined. Raises ApiError 400 naming the place.

    Keys with null or empty values pass, since clients send back whole answers as history.
    """
    where = f"messages[{index}]"

    def wrong(text: str) -> ApiError:
        return bad_request(f"{where}{text}", param="messages")

    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise wrong(".role must be a non-empty string")
    out: dict[str, Any] = {"role": role}
    for key, value in message.items():
        if key in ("role", "content") or value is None or value == []:
            continue
        if key in _MESSAGE_OFF:
            raise wrong(f".{key}: tool calls and audio are not supported by this server")
        if key not in _MESSAGE_KNOWN:
            raise wrong(f" has an unknown field `{key[:64]}`")
        out[key] = value
    content = message.get("content")
    if content is None and role == "assistant":
        content = ""
    if isinstance(content, list):
        content = "\n".join(_part(part, f"{where}.content[{i}]") for i, part in enumerate(content))
    if not isinstance(content, str):
        raise wrong(".content must be a string or a list of text parts")
    out["content"] = content
    return out


def _part(part: object, where: str) -> str:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise bad_request(f'{where} must be an object with a "type"', param="messages")
    if part["type"] != "text":
        raise bad_request(
            f"{where}: parts of type `{part['type'][:64]}` are not supported; this model takes text",
            param="messages",
            code="unsupported_content",
        )
    if not isinstance(part.get("text"), str):
        raise bad_request(f"{where}.text must be a string", param="messages")
    return str(part["text"])
