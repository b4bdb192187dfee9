"""What every endpoint needs, and the steps that chat and completions share before a prompt reaches the engine: model
names, templates, tokenizing off the event loop, checks of prompts.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from xllm_compiler.runtime.chat_template import ChatTemplate
from xllm_compiler.runtime.model_info import ModelInfo
from xllm_compiler.runtime.sampling_params import SamplingParams
from xllm_compiler.runtime.server.aside import Aside
from xllm_compiler.runtime.server.budget import Budget
from xllm_compiler.runtime.server.decode import MAX_MESSAGES, Bounds, message_extras, too_many_messages
from xllm_compiler.runtime.server.engine_client import EngineClient
from xllm_compiler.runtime.server.errors import ApiError, bad_request, unavailable
from xllm_compiler.runtime.server.metrics import Metrics
from xllm_compiler.runtime.server.params import fit_to_context
from xllm_compiler.runtime.server.protocol import Message, Part
from xllm_compiler.step.interface import STEP

_INLINE_CHARACTERS = 4096  # tokenizing this much takes under a millisecond; more goes to a thread
_INLINE_TOKENS = 4096  # likewise for making a text of them
_BREATH = 1 << 16  # tokens or characters that are looked at before others have their turn
# Names that a request may not bind in the chat template: they have their own fields, or none on purpose.
_TEMPLATE_OWN = frozenset(
    ("messages", "chat_template", "tools", "documents", "add_generation_prompt", "continue_final_message")
)


class Encoding(Protocol):
    """What the tokenizer made of a text; `ids` makes a list at each use."""

    @property
    def ids(self) -> list[int]: ...


class TokenizerLike(Protocol):
    """What the server needs of `runtime.tokenizer.Tokenizer`."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...
    def encoding(self, text: str, add_special_tokens: bool = True) -> Encoding: ...
    @property
    def characters_per_token(self) -> int | None: ...
    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...
    def decode_within(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...
    def token_bytes(self, token: int) -> bytes: ...
    def special_name(self, token: int) -> str | None: ...
    def spans(self, text: str, add_special_tokens: bool) -> list[int]: ...
    def id_to_token(self, token: int) -> str | None: ...
    @property
    def context(self) -> Sequence[int]: ...
    @property
    def special_tokens(self) -> dict[str, str]: ...
    @property
    def chat_template(self) -> ChatTemplate: ...


@dataclass
class Context:
    """One server's parts. `health` says what is wrong with the engine, or nothing when all is well."""

    tokenizer: TokenizerLike
    model_info: ModelInfo
    engine_client: EngineClient
    metrics: Metrics
    names: tuple[str, ...]
    defaults: Mapping[str, Any]
    health: Callable[[], str | None]
    version: str
    pool_tokens: int  # what the whole KV pool holds
    template: ChatTemplate | None = None  # instead of the tokenizer's own
    max_body_size: int = 4 * 2**20
    budget: Budget = field(default_factory=lambda: Budget(128 * 2**20))
    max_text: int = 4 * 2**20  # bytes of UTF-8 that are tokenized at once
    receive_timeout: float = 30.0
    retry_after: int = 5
    draining: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    aside: Aside = field(init=False)

    def __post_init__(self) -> None:
        self.aside = Aside(4 * self.max_body_size)

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

    def check_function(self, function: str) -> None:
        """Raises ApiError 400 where the model cannot do what an endpoint is for."""
        if function in self.model_info.functions:
            return
        can = "makes embeddings, at /v1/embeddings" if function == STEP else "answers chats and completions"
        cannot = "generates no text" if function == STEP else "makes no embeddings"
        raise ApiError(
            400,
            f"The model `{self.name}` {cannot}: it {can}.",
            param="model",
            code="model_not_supported",
        )

    def check_open(self) -> None:
        """Raises ApiError 503 while the server drains."""
        if self.draining:
            raise unavailable("the server is shutting down", code="draining", retry_after=self.retry_after)

    @property
    def bounds(self) -> Bounds:
        return Bounds(self.model_info.vocab_size, self.engine_client.max_open, self.model_info.max_model_len)

    async def encode(
        self, text: str, *, add_special_tokens: bool, field: str = "prompt", cut: int | None = None
    ) -> list[int]:
        """Token ids of a text.

        Long texts are tokenized on another thread, so that streams go on. A text that is too long whatever it holds is
        refused before. `cut` is truncate_prompt_tokens: with it a text of any length fits. Raises ApiError 400 and 429.
        """
        if len(text) <= _INLINE_CHARACTERS:
            return self.tokenizer.encode(text, add_special_tokens)

        size = len(text.encode(errors="replace"))
        if size > self.max_text:
            raise bad_request(
                f"the text has {size} bytes, and this server has memory to tokenize {self.max_text} at once",
                param=field,
                code="too_large",
            )

        def work() -> Encoding | None:
            if cut is None:
                most = self.tokenizer.characters_per_token
                if most is not None and len(text) > most * self.model_info.max_model_len:
                    return None
            return self.tokenizer.encoding(text, add_special_tokens)

        encoding = await self.aside.run(sys.getsizeof(text), work)
        if encoding is None:
            raise bad_request(
                f"This model's maximum context length is {self.model_info.max_model_len} tokens. However, your request "
                f"has a text of {len(text)} characters, which cannot be so few. Please reduce the length of the input.",
                param=field,
                code="context_length_exceeded",
            )
        return list(encoding.ids)

    async def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of ids that are within the vocabulary. Long lists go to another thread, as in `encode`."""
        if len(ids) <= _INLINE_TOKENS:
            return self.tokenizer.decode(ids, skip_special_tokens)
        return await self.aside.run(8 * len(ids), lambda: self.tokenizer.decode(ids, skip_special_tokens))

    async def decode_within(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The same as it reads within a longer text."""
        if len(ids) <= _INLINE_TOKENS:
            return self.tokenizer.decode_within(ids, skip_special_tokens)
        return await self.aside.run(8 * len(ids), lambda: self.tokenizer.decode_within(ids, skip_special_tokens))

    async def spans(self, text: str, add_special_tokens: bool) -> list[int]:
        """Where each token of a text that was tokenized before begins in it, in characters."""
        if len(text) <= _INLINE_CHARACTERS:
            return self.tokenizer.spans(text, add_special_tokens)
        return await self.aside.run(sys.getsizeof(text), lambda: self.tokenizer.spans(text, add_special_tokens))

    async def token_names(self, ids: Sequence[int]) -> list[str]:
        """The vocabulary's names of tokens. The event loop serves others in between."""
        names: list[str] = []
        for start in range(0, len(ids), _INLINE_TOKENS):
            names += [self.tokenizer.id_to_token(i) or "" for i in ids[start : start + _INLINE_TOKENS]]
            await asyncio.sleep(0)
        return names

    async def check_token_ids(self, ids: Sequence[int], field: str) -> None:
        """Raises ApiError 400 for ids that the model does not have."""
        for start in range(0, len(ids), _BREATH):
            some = ids[start : start + _BREATH]
            if min(some) < 0 or max(some) >= self.model_info.vocab_size:
                wrong = next(i for i in some if not 0 <= i < self.model_info.vocab_size)
                shown = wrong if abs(wrong) < 10**18 else "with more than 18 digits"
                raise bad_request(
                    f"token id {shown} is not within the vocabulary [0, {self.model_info.vocab_size})", param=field
                )
            if len(some) == _BREATH:
                await asyncio.sleep(0)

    def fit(self, params: SamplingParams, prompt_tokens: int, *, explicit: bool, field: str) -> None:
        """`fit_to_context` with this server's sizes."""
        fit_to_context(
            params, prompt_tokens, self.model_info.max_model_len, self.pool_tokens, explicit=explicit, field=field
        )

    def truncate(self, ids: list[int], limit: int | None) -> list[int]:
        """The last `limit` tokens; -1 means as many as the model takes beside one new token."""
        if limit is None:
            return ids
        if limit == -1:
            limit = self.model_info.max_model_len - 1
        if limit < 1:
            raise bad_request(
                f"truncate_prompt_tokens must be -1 or at least 1, got {limit}", param="truncate_prompt_tokens"
            )
        return ids[-limit:]

    async def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool | None,
        continue_final_message: bool | None,
        kwargs: Mapping[str, Any] | None,
    ) -> str:
        """The conversation as the model's template writes it. Raises ApiError or XllmError("request")."""
        for name in kwargs or ():
            if name in _TEMPLATE_OWN:
                raise bad_request(f"`chat_template_kwargs` may not set `{name}`", param="chat_template_kwargs")
        if max(len(messages), sum(len(m.content) for m in messages if isinstance(m.content, list))) > MAX_MESSAGES:
            raise too_many_messages()
        proceed = bool(continue_final_message)
        chat = [_message(message, index) for index, message in enumerate(messages)]
        prompt = not proceed if add_generation_prompt is None else add_generation_prompt
        template = self.tokenizer.chat_template if self.template is None else self.template
        return await template.arender(
            chat,
            add_generation_prompt=prompt,
            continue_final_message=proceed,
            variables={**self.tokenizer.special_tokens, **(kwargs or {})},
        )


def _message(message: Message, index: int) -> dict[str, Any]:
    """A checked message, its content text or text parts. Raises ApiError 400 naming the place."""
    where = f"messages[{index}]"
    role, content = message.role, message.content
    if not role:
        raise bad_request(f"{where}.role must be a non-empty string", param="messages")
    out: dict[str, Any] = {"role": role, **message_extras(message, where)}
    if content is None and role == "assistant":
        content = ""
    if content is None:
        raise bad_request(f"{where}.content must be a string or a list of text parts", param="messages")
    if isinstance(content, list):
        texts = [_part(part, f"{where}.content[{i}]") for i, part in enumerate(content)]
        out["content"] = [{"type": "text", "text": text} for text in texts] or ""
    else:
        out["content"] = content
    return out


def _part(part: Part, where: str) -> str:
    if part.type != "text":
        raise bad_request(
            f"{where}: parts of type `{part.type[:64]}` are not supported; this model takes text",
            param="messages",
            code="unsupported_content",
        )
    if part.text is None:
        raise bad_request(f"{where}.text must be a string", param="messages")
    return part.text
