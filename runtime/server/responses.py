"""The shapes of answers: OpenAI's, with vLLM's extra fields. Data only; must not know how an answer comes about.

Fields are written in this order, nulls included, because clients index them. Fields of type `X | UnsetType` are extras
that appear only when they were asked for. `Raw` is JSON already: what is long is encoded piece by piece.
"""

from __future__ import annotations

from msgspec import UNSET, Raw, Struct, UnsetType


class Usage(Struct):
    """Tokens. `completion_tokens` covers every choice, `prompt_tokens` counts each prompt once."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int


def usage_of(prompt_tokens: int, completion_tokens: int) -> Usage:
    return Usage(prompt_tokens, prompt_tokens + completion_tokens, completion_tokens)


class CompletionLogprobs(Struct):
    """Parallel lists, one item per token; null for the first token of an echoed prompt, which nothing predicts."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | Raw | None]


class CompletionChoice(Struct):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    prompt_logprobs: list[dict[str, TokenLogprob] | Raw | None] | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class TokenLogprob(Struct):
    """One item of vLLM's `prompt_logprobs`, keyed by the token id as a string."""

    logprob: float
    rank: int | None
    decoded_token: str | None


class Completion(Struct):
    """A whole answer, or one chunk of a stream, of /v1/completions."""

    id: str
    object: str
    created: int
    model: str
    choices: list[CompletionChoice]
    system_fingerprint: str
    usage: Usage | UnsetType | None = UNSET


class Embedding(Struct):
    object: str
    embedding: list[float] | str
    index: int


class EmbeddingUsage(Struct):
    """Tokens of all inputs."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(Struct):
    """The answer of /v1/embeddings."""

    object: str
    data: list[Embedding | Raw]
    model: str
    usage: EmbeddingUsage


class ChatTopLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[ChatTopLogprob]


class ChatLogprobs(Struct):
    content: list[ChatTokenLogprob | Raw]


class ChatMessage(Struct):
    role: str
    content: str
    refusal: str | None = None


class ChatChoice(Struct):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | UnsetType = UNSET


class Chat(Struct):
    id: str
    object: str
    created: int
    model: str
    choices: list[ChatChoice]
    system_fingerprint: str
    usage: Usage
    prompt_logprobs: list[dict[str, TokenLogprob] | Raw | None] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class ChatDelta(Struct):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChunkChoice(Struct):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatChunk(Struct):
    id: str
    object: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    system_fingerprint: str
    usage: Usage | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class ModelCard(Struct):
    id: str
    created: int
    root: str
    max_model_len: int
    object: str = "model"
    owned_by: str = "xllm"
    parent: str | None = None


class ModelList(Struct):
    data: list[ModelCard]
    object: str = "list"


class Tokenized(Struct):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(Struct):
    prompt: str
