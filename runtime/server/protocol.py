"""The requests that clients may send: their fields, types and the strict decoder.

Owns field names and JSON types. Ranges of values and their meaning are in `params.py`; response shapes are in
`responses.py`. Must not import the engine.

A field that would change the answer and that we do not act on is refused by name, and so is a field that nobody knows:
ignoring either would be a wrong answer that looks right.
"""

from __future__ import annotations

import difflib
import re
from typing import Any, TypeVar

import msgspec

from xllm_compiler.runtime.server.errors import ApiError, bad_request


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool | None = None


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
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[int] | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    user: str | None = None
    request_id: str | None = None


class CompletionRequest(_Generation, kw_only=True):
    """POST /v1/completions. `logprobs` is the number of alternatives beside the sampled token."""

    prompt: str | list[str | int | list[int]]
    echo: bool | None = None
    logprobs: int | None = None


class ChatRequest(_Generation, kw_only=True):
    """POST /v1/chat/completions. `logprobs` switches them on, `top_logprobs` is the number of alternatives."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """POST /tokenize: a prompt, or messages that go through the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
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
_HARMLESS = frozenset(
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
_OFF: dict[str, tuple[Any, ...]] = {
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

T = TypeVar("T", CompletionRequest, ChatRequest, TokenizeRequest, DetokenizeRequest)


def decode_request(body: bytes, kind: type[T]) -> T:
    """A request from a body, or an ApiError 400 that says what is wrong with it and where.

    NaN and Infinity are not JSON and are refused, as are invalid UTF-8, numbers that no float64 holds, and nesting
    deeper than the interpreter's stack.
    """
    try:
        tree = msgspec.json.decode(body)
    except UnicodeDecodeError as error:
        raise bad_request(f"the body is not valid UTF-8: {error.reason} at byte {error.start}", code="json") from None
    except RecursionError:
        raise bad_request("the body is nested too deeply", code="json") from None
    except msgspec.DecodeError as error:
        raise bad_request(f"the body is not valid JSON: {error}", code="json") from None
    if not isinstance(tree, dict):
        raise bad_request("the body must be a JSON object", code="json")
    known = kind.__struct_fields__
    for name in [name for name in tree if name not in known]:
        _check_foreign(name, tree.pop(name), known)
    try:
        return msgspec.convert(tree, kind)
    except RecursionError:
        raise bad_request("the body is nested too deeply", code="json") from None
    except msgspec.ValidationError as error:
        raise _explain(str(error)) from None


def _check_foreign(name: str, value: Any, known: tuple[str, ...]) -> None:
    if name in _HARMLESS:
        return
    if name in _OFF:
        if not any(value == off and isinstance(value, bool) is isinstance(off, bool) for off in _OFF[name]):
            raise bad_request(f"`{name}` is not supported by this server", param=name, code="unsupported_field")
        return
    near = difflib.get_close_matches(name[:64], [*known, *_HARMLESS, *_OFF], n=1, cutoff=0.7)
    hint = f"; did you mean `{near[0]}`?" if near else ""
    raise bad_request(f"unknown field `{name[:64]}`{hint}", param=name[:64], code="unknown_field")


def _explain(message: str) -> ApiError:
    """msgspec's "Expected `int | null`, got `str` - at `$.max_tokens`" in our error shape."""
    text, _, path = message.partition(" - at `$")
    path = path.rstrip("`")
    missing = re.fullmatch(r"Object missing required field `(\w+)`", text)
    if missing is not None:
        name = f"{path[1:]}.{missing[1]}" if path else missing[1]
        return bad_request(f"`{name}` is required", param=name, code="missing_field")
    field = re.match(r"\.?(\w+)", path)
    param = field[1] if field is not None else None
    where = f"`{path.lstrip('.')}`: " if path else ""
    return bad_request(f"{where}{text[0].lower()}{text[1:]}", param=param, code="invalid_type")
