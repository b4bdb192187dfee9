"""From a request's fields to `SamplingParams`: defaults, and the rules of the context length. `SamplingParams` checks
ranges.

Precedence: the request, then the model's generation_config.json (unless switched off), then neutral defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xllm_compiler.errors import XllmError
from xllm_compiler.runtime.sampling_params import SamplingParams
from xllm_compiler.runtime.server.decode import too_long
from xllm_compiler.runtime.server.errors import bad_request, from_xllm
from xllm_compiler.runtime.server.protocol import ChatRequest, CompletionRequest

COMPLETION_MAX_TOKENS = 16  # OpenAI's default for /v1/completions; chat runs to the model's length
# Fields that keep their name and meaning on the way through.
_COPIED = (
    "n",
    "seed",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "min_tokens",
    "logit_bias",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "skip_special_tokens",
    "allowed_token_ids",
    "prompt_logprobs",
)


def check_stream_options(request: CompletionRequest | ChatRequest) -> None:
    """Raises ApiError for stream options that contradict the rest of the request."""
    if request.stream_options is not None:
        if not request.stream:
            raise bad_request("`stream_options` needs `stream`: true", param="stream_options")
        if request.stream_options.include_obfuscation:
            raise bad_request("`include_obfuscation` is not supported by this server", param="stream_options")
    if request.stream and request.prompt_logprobs is not None:
        raise bad_request("`prompt_logprobs` cannot be streamed", param="prompt_logprobs")


def completion_params(request: CompletionRequest, defaults: Mapping[str, Any]) -> SamplingParams:
    """Sampling of a /v1/completions request. Raises ApiError 400 naming the field."""
    values = {"max_tokens": COMPLETION_MAX_TOKENS, **defaults}
    if request.max_tokens is not None:
        values["max_tokens"] = request.max_tokens
    if request.logprobs is not None:
        values["logprobs"] = request.logprobs
    if request.echo and (request.logprobs is not None or request.max_tokens == 0):
        # With nothing to generate the engine still wants a reason to run: the prompt's own scores.
        values["prompt_logprobs"] = request.logprobs or 0
        if request.prompt_logprobs not in (None, values["prompt_logprobs"]):
            raise bad_request("`echo` with `logprobs` fixes `prompt_logprobs`; leave it out", param="prompt_logprobs")
    return _finish(request, values)


def chat_params(request: ChatRequest, defaults: Mapping[str, Any]) -> SamplingParams:
    """Sampling of a /v1/chat/completions request. Raises ApiError 400 naming the field."""
    values = {"max_tokens": None, **defaults}
    if request.max_tokens is not None and request.max_completion_tokens not in (None, request.max_tokens):
        raise bad_request("`max_tokens` and `max_completion_tokens` contradict each other", param="max_tokens")
    limit = request.max_completion_tokens if request.max_completion_tokens is not None else request.max_tokens
    if limit is not None:
        if limit < 1:  # a chat has no echo, so an answer without tokens has no use
            field = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
            raise bad_request(f"{field} must be an integer of at least 1, got {limit}", param=field)
        values["max_tokens"] = limit
    if request.top_logprobs is not None and not request.logprobs:
        if request.top_logprobs != 0:
            raise bad_request("`top_logprobs` needs `logprobs`: true", param="top_logprobs")
    elif request.logprobs:
        values["logprobs"] = request.top_logprobs or 0
    try:
        return _finish(request, values)
    except XllmError as error:
        raise from_xllm(error, param="top_logprobs" if error.where == "logprobs" else None) from None


def _finish(request: CompletionRequest | ChatRequest, values: dict[str, Any]) -> SamplingParams:
    for name in _COPIED:
        given = getattr(request, name)
        if given is not None:
            values[name] = given
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise bad_request("`best_of` other than `n` is not supported", param="best_of", code="unsupported_field")
    return SamplingParams(**values)


def fit_to_context(
    params: SamplingParams, prompt_tokens: int, max_model_len: int, pool_tokens: int, *, explicit: bool, field: str
) -> None:
    """Make `max_tokens` fit what the prompt leaves of the model's length and of the whole KV pool.

    A limit that the client gave is never lowered behind its back: that is a 400 with the numbers. `explicit` says
    whether the client gave one, `field` is the name of the prompt's field. Raises ApiError.
    """
    least = 0 if params.max_tokens == 0 else 1
    if prompt_tokens + least > max_model_len:
        raise too_long(prompt_tokens, max_model_len, field)
    wanted = params.max_tokens if explicit and params.max_tokens is not None else least
    if prompt_tokens + wanted > max_model_len:
        raise bad_request(
            f"'max_tokens' or 'max_completion_tokens' is too large: {wanted}. This model's maximum context length is "
            f"{max_model_len} tokens and your request has {prompt_tokens} input tokens "
            f"({wanted} > {max_model_len} - {prompt_tokens}).",
            param="max_tokens",
            code="context_length_exceeded",
        )
    if prompt_tokens + wanted > pool_tokens:
        raise bad_request(
            f"The request needs room for {prompt_tokens + wanted} tokens, {prompt_tokens} of them in the prompt, but "
            f"the whole KV cache of this server holds {pool_tokens}.",
            param=field,
            code="capacity",
        )
    room = min(max_model_len, pool_tokens) - prompt_tokens
    params.max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
    if params.min_tokens > params.max_tokens:
        raise bad_request(
            f"min_tokens is {params.min_tokens}, but the prompt leaves room for {params.max_tokens} tokens",
            param="min_tokens",
        )
