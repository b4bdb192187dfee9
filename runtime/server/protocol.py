"""The requests that clients may send: their fields and types.

Owns field names and JSON types. `decode.py` reads bodies; ranges of values and their meaning are in `params.py`;
response shapes are in `responses.py`. Must not import the engine.

A field that would change the answer and that we do not act on is refused by name, and so is a field that nobody knows:
ignoring either would be a wrong answer that looks right.
"""

from __future__ import annotations

from typing import Any

import msgspec


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool | None = None


class Part(msgspec.Struct, gc=False):
    """One part of a message's content; other keys change nothing and are passed over."""

    type: str
    text: str | None = None


class Message(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    """One message of a conversation. `Raw` values are what `decode.message_extras` makes of them."""

    role: str
    content: str | list[Part] | None = None
    name: msgspec.Raw = msgspec.Raw()
    refusal: msgspec.Raw = msgspec.Raw()
    annotations: msgspec.Raw = msgspec.Raw()
    reasoning: msgspec.Raw = msgspec.Raw()
    reasoning_content: msgspec.Raw = msgspec.Raw()
    tool_calls: msgspec.Raw = msgspec.Raw()
    tool_call_id: msgspec.Raw = msgspec.Raw()
    function_call: msgspec.Raw = msgspec.Raw()
    audio: msgspec.Raw = msgspec.Raw()


class _Generation(msgspec.Struct, kw_only=True):
    """What chat and completions have in common. None always means "not given"."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    n: int | None = None
    best_of: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    user: str | None = None
    request_id: str | None = None

    def forget_lists(self) -> None:
        """Let go of what may be large, once it has become parameters and tokens: an answer may take long."""
        self.stop = self.stop_token_ids = self.allowed_token_ids = self.logit_bias = None


class CompletionRequest(_Generation, kw_only=True):
    """POST /v1/completions. `logprobs` is the number of alternatives beside the sampled token."""

    prompt: str | list[str | int | list[int]]  # of one kind only, which `decode.py` sees to
    echo: bool | None = None
    logprobs: int | None = None

    def forget_lists(self) -> None:
        super().forget_lists()
        self.prompt = ""


class ChatRequest(_Generation, kw_only=True):
    """POST /v1/chat/completions. `logprobs` switches them on, `top_logprobs` is the number of alternatives."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def forget_lists(self) -> None:
        super().forget_lists()
        self.messages, self.chat_template_kwargs = [], None


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """POST /tokenize: a prompt, or messages that go through the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """POST /detokenize."""

    tokens: list[int]
    model: str | None = None


# Fields that cannot change the tokens of an answer: accepted and not looked at.
HARMLESS = frozenset(
    (
        "cache_salt",
        "metadata",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "user",
    )
)

# Fields that we know and do not act on, with the values that mean "off". Any other value is refused.
OFF: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "bad_words": (None, []),
    "chat_template": (None,),
    "documents": (None, []),
    "early_stopping": (None, False),
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "kv_transfer_params": (None,),
    "length_penalty": (None, 1.0),
    "logits_processors": (None, []),
    "mm_processor_kwargs": (None, {}),
    "modalities": (None, ["text"]),
    "priority": (None, 0),
    "reasoning_effort": (None,),
    "response_format": (None, {"type": "text"}),
    "spaces_between_special_tokens": (None, True),
    "store": (None, False),
    "structured_outputs": (None, {}),
    "suffix": (None, ""),
    "thinking_token_budget": (None,),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "use_beam_search": (None, False),
    "verbosity": (None,),
    "web_search_options": (None,),
}
