"""The requests that clients may send: their fields and types.

Owns field names and JSON types. `decode.py` reads bodies; ranges of values and their meaning are in `params.py`;
response shapes are in `responses.py`. Must not import the engine.

A field that would change the answer and that we do not act on is refused by name, and so is a field that nobody knows:
ignoring either would be a wrong answer that looks right.

The string below a field is its line in docs/serving.md, which `python docs/serving.py` writes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool | None = None


class Part(msgspec.Struct, gc=False):
    """One part of a message's content; other keys change nothing and are passed over."""

    type: str
    """`text`. Parts of other types are refused: no model here reads images or sound."""
    text: str | None = None
    """The text."""


class Message(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    """One message of a conversation. `Raw` values are what `decode.message_extras` makes of them."""

    role: str
    """What the chat template knows: `system`, `user`, `assistant`."""
    content: str | list[Part] | None = None
    """Text, or a list of text parts. The template gets the form that it reads. Only an assistant's may be null."""
    name: msgspec.Raw = msgspec.Raw()
    """Passed to the template."""
    refusal: msgspec.Raw = msgspec.Raw()
    """Passed to the template."""
    annotations: msgspec.Raw = msgspec.Raw()
    """Passed to the template."""
    reasoning: msgspec.Raw = msgspec.Raw()
    """Passed to the template."""
    reasoning_content: msgspec.Raw = msgspec.Raw()
    """Passed to the template."""
    tool_calls: msgspec.Raw = msgspec.Raw()
    """Refused unless null or `[]`: there are no tools."""
    tool_call_id: msgspec.Raw = msgspec.Raw()
    """Refused unless null or `[]`: there are no tools."""
    function_call: msgspec.Raw = msgspec.Raw()
    """Refused unless null or `[]`: there are no tools."""
    audio: msgspec.Raw = msgspec.Raw()
    """Refused unless null or `[]`: there is no audio."""


class _Generation(msgspec.Struct, kw_only=True):
    """What chat and completions have in common. None always means "not given"."""

    model: str | None = None
    """A name that the server goes by (`/v1/models`). Left out: the first of them."""
    stream: bool | None = None
    """Answer in server-sent events, one for each piece of text; `data: [DONE]` is the last."""
    stream_options: StreamOptions | None = None
    """`include_usage`: a last event with the usage. `continuous_usage_stats`: the usage in every event. \
`include_obfuscation`: refused when true."""
    max_tokens: int | None = None
    """Most new tokens, at least 1; 0 for a completion that only scores its prompt. Default: 16 for completions, what \
is left of the model's length for chat."""
    min_tokens: int | None = None
    """No stop token and no stop string ends the answer before so many tokens."""
    temperature: float | None = None
    """0 to 100; below 0.00001 the most likely token is taken."""
    top_p: float | None = None
    """Above 0 up to 1: sample from the most likely tokens that together have this probability."""
    top_k: int | None = None
    """Sample from so many of the most likely tokens; 0 or -1 is all."""
    min_p: float | None = None
    """0 to 1: leave out tokens less likely than this share of the most likely one."""
    n: int | None = None
    """Choices for each prompt, 1 to 128."""
    best_of: int | None = None
    """Only what `n` is; any other number is refused."""
    seed: int | None = None
    """The same seed and the same request give the same answer."""
    stop: str | list[str] | None = None
    """At most 64 strings of 1 to 1,024 characters that end the answer. They are cut off."""
    stop_token_ids: list[int] | None = None
    """Tokens that end the answer, beside the model's own."""
    include_stop_str_in_output: bool | None = None
    """Leave the stop string in the text."""
    ignore_eos: bool | None = None
    """Go on after the model's end of text."""
    presence_penalty: float | None = None
    """-2 to 2: subtracted from the logits of tokens that the answer has."""
    frequency_penalty: float | None = None
    """-2 to 2: subtracted for each time that the answer has the token."""
    repetition_penalty: float | None = None
    """Above 0 up to 100: beyond 1, tokens that prompt or answer have become less likely; 1 changes nothing."""
    logit_bias: dict[int, float] | None = None
    """Token id to a number from -100 to 100 that is added to its logit."""
    allowed_token_ids: list[int] | None = None
    """Nothing but these tokens is sampled."""
    prompt_logprobs: int | None = None
    """0 to 20: log-probabilities of the prompt's tokens, with so many alternatives. Not with `stream`."""
    skip_special_tokens: bool | None = None
    """Leave special tokens out of the text. Default: true."""
    add_special_tokens: bool | None = None
    """Let the tokenizer add its special tokens. Default: true for completions, false for chat (the template does)."""
    truncate_prompt_tokens: int | None = None
    """Keep only the last so many tokens of the prompt; -1: as many as fit."""
    return_token_ids: bool | None = None
    """Add `token_ids` to choices, and `prompt_token_ids`."""
    return_tokens_as_token_ids: bool | None = None
    """Tokens in log-probabilities are spelt `token_id:123`."""
    user: str | None = None
    """Ignored."""
    request_id: str | None = None
    """Ignored; the header `x-request-id` is used and sent back."""

    def forget_lists(self) -> None:
        """Let go of what may be large, once it has become parameters and tokens: an answer may take long."""
        self.stop = self.stop_token_ids = self.allowed_token_ids = self.logit_bias = None


class CompletionRequest(_Generation, kw_only=True):
    """POST /v1/completions. `logprobs` is the number of alternatives beside the sampled token."""

    prompt: str | list[str | int | list[int]]  # of one kind only, which `decode.py` sees to
    """A text, token ids, or a list of either. Each prompt gets `n` choices, in order."""
    echo: bool | None = None
    """Put the prompt before the answer; with `logprobs`, score it too."""
    logprobs: int | None = None
    """0 to 20: log-probabilities of the answer's tokens, with so many alternatives."""

    def forget_lists(self) -> None:
        super().forget_lists()
        self.prompt = ""


class ChatRequest(_Generation, kw_only=True):
    """POST /v1/chat/completions. `logprobs` switches them on, `top_logprobs` is the number of alternatives."""

    messages: list[Message]
    """The conversation; it goes through the model's chat template."""
    max_completion_tokens: int | None = None
    """OpenAI's newer name of `max_tokens`."""
    logprobs: bool | None = None
    """Log-probabilities of the answer's tokens."""
    top_logprobs: int | None = None
    """0 to 20: alternatives of each token. Needs `logprobs`."""
    add_generation_prompt: bool | None = None
    """Let the template begin the assistant's message. Default: true, unless `continue_final_message`."""
    continue_final_message: bool | None = None
    """Go on with the last message instead of beginning a new one."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables that the template sees under their names, for example `{"enable_thinking": false}`."""

    def forget_lists(self) -> None:
        super().forget_lists()
        self.messages, self.chat_template_kwargs = [], None


class EmbeddingRequest(msgspec.Struct, kw_only=True):
    """POST /v1/embeddings."""

    input: str | list[str | int | list[int]]  # of one kind only, which `decode.py` sees to
    """A text, token ids, or a list of either. Each gets an embedding, in order."""
    model: str | None = None
    """As above."""
    encoding_format: str | None = None
    """`float` (the default): a list of numbers. `base64`: their bytes, little-endian 32-bit floats."""
    dimensions: int | None = None
    """Cut embeddings to so many numbers, and normalize them again where the model's are normalized. Refused unless \
the checkpoint says that it was trained for that."""
    add_special_tokens: bool | None = None
    """Let the tokenizer add its special tokens. Default: true."""
    user: str | None = None
    """Ignored."""


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """POST /tokenize: a prompt, or messages that go through the chat template."""

    model: str | None = None
    """As above."""
    prompt: str | None = None
    """The text. Give this or `messages`."""
    messages: list[Message] | None = None
    """The conversation."""
    add_special_tokens: bool | None = None
    """Default: true for a prompt, false for messages."""
    add_generation_prompt: bool | None = None
    """As for chat."""
    continue_final_message: bool | None = None
    """As for chat."""
    chat_template_kwargs: dict[str, Any] | None = None
    """As for chat."""
    return_token_strs: bool | None = None
    """Add `token_strs`, the vocabulary's names of the tokens."""


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """POST /detokenize."""

    tokens: list[int]
    """Token ids."""
    model: str | None = None
    """As above."""


# Fields that cannot change the tokens of an answer: accepted and not looked at. Values say why.
HARMLESS = {
    "cache_salt": "no prompt's cache is shared",
    "metadata": "nothing is stored",
    "parallel_tool_calls": "there are no tools",
    "prediction": "a hint for speed only",
    "prompt_cache_key": "no prompt's cache is shared",
    "prompt_cache_retention": "no prompt's cache is shared",
    "safety_identifier": "users are not told apart",
    "service_tier": "there is one",
    "user": "users are not told apart",
}


@dataclass(frozen=True)
class Off:
    """The values of a field that mean "off", and why no other one is accepted."""

    values: tuple[Any, ...]
    why: str


_NO_TOOLS = "there are no tools"
_NO_GRAMMAR = "answers cannot be held to a grammar"
_NO_BEAMS = "there is no beam search"
_NO_REASONING = "the server has no switch for reasoning; a template may, by `chat_template_kwargs`"

# Fields that we know and do not act on. Any value but those that mean "off" is refused.
OFF = {
    "audio": Off((None,), "answers are text"),
    "bad_words": Off((None, []), "not there; `logit_bias` of -100 forbids tokens"),
    "chat_template": Off((None,), "a template is a program; the server's owner chooses it (`--chat-template`)"),
    "documents": Off((None, []), "the template gets none"),
    "early_stopping": Off((None, False), _NO_BEAMS),
    "function_call": Off((None, "none", "auto"), _NO_TOOLS),
    "functions": Off((None, []), _NO_TOOLS),
    "guided_choice": Off((None,), _NO_GRAMMAR),
    "guided_grammar": Off((None,), _NO_GRAMMAR),
    "guided_json": Off((None,), _NO_GRAMMAR),
    "guided_regex": Off((None,), _NO_GRAMMAR),
    "kv_transfer_params": Off((None,), "the KV cache stays in this process"),
    "length_penalty": Off((None, 1.0), _NO_BEAMS),
    "logits_processors": Off((None, []), "they would be code from a client"),
    "mm_processor_kwargs": Off((None, {}), "models read text"),
    "modalities": Off((None, ["text"]), "answers are text"),
    "priority": Off((None, 0), "requests run in the order of arrival"),
    "reasoning_effort": Off((None,), _NO_REASONING),
    "response_format": Off((None, {"type": "text"}), _NO_GRAMMAR),
    "spaces_between_special_tokens": Off((None, True), "special tokens are decoded as the tokenizer does"),
    "store": Off((None, False), "nothing is stored"),
    "structured_outputs": Off((None, {}), _NO_GRAMMAR),
    "suffix": Off((None, ""), "models continue a text, they do not fill gaps"),
    "thinking_token_budget": Off((None,), _NO_REASONING),
    "tool_choice": Off((None, "none", "auto"), _NO_TOOLS),
    "tools": Off((None, []), _NO_TOOLS),
    "use_beam_search": Off((None, False), _NO_BEAMS),
    "verbosity": Off((None,), "models have no such switch"),
    "web_search_options": Off((None,), "nothing is searched"),
}
