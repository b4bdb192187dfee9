"""From a body to a request, at a cost that is known before it is paid.

A body is first only scanned: every field stays as bytes. That costs milliseconds, whatever the body holds. An unknown
field ends the scan. Then commas, brackets and quotes tell how many items a field can have. What is beyond the bounds is
refused before Python objects are made of it. The meaning of fields is elsewhere (`params.py`).
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import msgspec

from xllm_compiler.runtime.sampling_params import MAX_STOP_STRINGS
from xllm_compiler.runtime.server.budget import Hold
from xllm_compiler.runtime.server.errors import ApiError, bad_request
from xllm_compiler.runtime.server.protocol import (
    HARMLESS,
    OFF,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    Message,
    TokenizeRequest,
)

T = TypeVar("T", CompletionRequest, ChatRequest, EmbeddingRequest, TokenizeRequest, DetokenizeRequest)

_PROMPT_FIELDS = ("prompt", "input")  # those that may be a text, texts, token ids or lists of them
MAX_MESSAGES = 8192  # and as many parts, in all messages together
_SMALL = 65536  # bytes of a field that is neither text nor a list of tokens
_TINY = 4096  # bytes of a value that means "off"
_QUOTES = 32 * MAX_MESSAGES  # of honest messages at their most: each has 8, each part has 8, and some have other keys


@dataclass(frozen=True, slots=True)
class Bounds:
    """The most that this server can take. `vocab`: token ids in a list; `prompts` in a request; `tokens` of a
    prompt."""

    vocab: int
    prompts: int
    tokens: int


def too_long(tokens: int, most: int, field: str) -> ApiError:
    """The refusal of a prompt that leaves no room in the model's length."""
    return bad_request(
        f"This model's maximum context length is {most} tokens. However, your request has {tokens} input tokens. "
        "Please reduce the length of the input.",
        param=field,
        code="context_length_exceeded",
    )


def too_many_prompts(count: int, n: int, most: int, field: str) -> ApiError:
    return bad_request(
        f"{count} prompts with n={n} are more than this server takes at once, {most}", param=field, code="capacity"
    )


@dataclass(slots=True)
class Body:
    """A request's body, and its share of the memory that bodies may take, until it is decoded: once."""

    data: bytes
    hold: Hold

    def decode(self, kind: type[T], bounds: Bounds) -> T:
        """Decode it with `decode_request`, and let go of the bytes."""
        data, self.data = self.data, b""
        try:
            return decode_request(data, kind, bounds)
        finally:
            self.hold.release()


def decode_request(body: bytes, kind: type[T], bounds: Bounds) -> T:
    """A request from a body, or an ApiError 400 that says what is wrong with it and where.

    NaN and Infinity are not JSON and are refused, as are invalid UTF-8, numbers that no float64 holds, and nesting
    deeper than the interpreter's stack.
    """
    if not body.isascii():
        try:
            body.decode()
        except UnicodeDecodeError as error:
            raise bad_request(
                f"the body is not valid UTF-8: {error.reason} at byte {error.start}", code="json"
            ) from None
    scanner, fields = _plan(kind)
    raw = _read(scanner, body, "", tuple(fields))
    values: dict[str, Any] = {}
    for name in fields:  # the prompt comes last: how long it may be depends on others
        text = bytes(getattr(raw, name))
        if text:
            values[name] = _field(name, text, fields[name], bounds, values)
        elif name in _required(kind):
            raise bad_request(f"`{name}` is required", param=name, code="missing_field")
    for name in OFF:
        text = bytes(getattr(raw, name))
        if text:
            _check_off(name, text)
    return kind(**values)


@functools.cache
def _plan(kind: type[Any]) -> tuple[msgspec.json.Decoder[Any], dict[str, msgspec.json.Decoder[Any]]]:
    """The decoder that leaves all fields as bytes, and those of the fields."""
    own = msgspec.structs.fields(kind)
    names = dict.fromkeys([*(field.name for field in own), *HARMLESS, *OFF])
    scan = msgspec.defstruct(
        kind.__name__, [(name, msgspec.Raw, msgspec.Raw()) for name in names], forbid_unknown_fields=True
    )
    late = (*_PROMPT_FIELDS, "messages", "tokens")
    order = sorted(own, key=lambda field: field.name in late)
    return msgspec.json.Decoder(scan), {field.name: msgspec.json.Decoder(field.type) for field in order}


@functools.cache
def _required(kind: type[Any]) -> frozenset[str]:
    return frozenset(field.name for field in msgspec.structs.fields(kind) if field.required)


def _read(decoder: msgspec.json.Decoder[Any], text: bytes, field: str, known: tuple[str, ...] = ()) -> Any:
    """Decoded text of a field, or of the whole body ("")."""
    try:
        return decoder.decode(text)
    except RecursionError:
        raise bad_request("the body is nested too deeply", param=field or None, code="json") from None
    except UnicodeDecodeError:  # half a surrogate pair, spelt as an escape
        raise bad_request(
            "the body holds a string that is not valid Unicode", param=field or None, code="json"
        ) from None
    except msgspec.ValidationError as error:
        raise _explain(str(error), field, known) from None
    except msgspec.DecodeError as error:
        raise bad_request(f"the body is not valid JSON: {error}", param=field or None, code="json") from None


def _field(name: str, text: bytes, decoder: msgspec.json.Decoder[Any], bounds: Bounds, others: dict[str, Any]) -> Any:
    check = _CHECKS.get(name, _check_small)
    check(name, text, bounds, others)
    if name in _PROMPT_FIELDS and text[:1] == b"[":
        return _read(_PROMPTS.get(_first(text), decoder), text, name)
    return _read(decoder, text, name)


def _first(text: bytes) -> bytes:
    """The first character inside an array."""
    return text[1:64].lstrip()[:1]


_PROMPTS: dict[bytes, msgspec.json.Decoder[Any]] = {
    b'"': msgspec.json.Decoder(list[str]),
    b"[": msgspec.json.Decoder(list[list[int]]),
    **{digit.encode(): msgspec.json.Decoder(list[int]) for digit in "-0123456789"},
}


def _strings_at_least(text: bytes) -> int:
    """A lower bound on the number of strings in JSON, and at least half of it.

    Each string begins with a quote after no backslash. A closing quote after an escaped backslash is not counted.
    """
    return (text.count(b'"') - text.count(b'\\"')) // 2


def _check_small(name: str, text: bytes, bounds: Bounds, others: dict[str, Any]) -> None:
    if len(text) > _SMALL:
        raise bad_request(f"`{name}` is larger than {_SMALL} bytes", param=name, code="too_large")


def _check_ids(name: str, text: bytes, bounds: Bounds, others: dict[str, Any]) -> None:
    count = text.count(b":") if name == "logit_bias" else text.count(b",") + 1
    if count > bounds.vocab:
        raise bad_request(
            f"`{name}` lists {count} tokens, more than the {bounds.vocab} of the vocabulary",
            param=name,
            code="too_large",
        )


def _check_stop(name: str, text: bytes, bounds: Bounds, others: dict[str, Any]) -> None:
    if _strings_at_least(text) > MAX_STOP_STRINGS:
        raise bad_request(f"stop must be at most {MAX_STOP_STRINGS} strings", param=name)


def _check_messages(name: str, text: bytes, bounds: Bounds, others: dict[str, Any]) -> None:
    if 2 * _strings_at_least(text) > _QUOTES:
        raise too_many_messages()


def too_many_messages() -> ApiError:
    return bad_request(
        f"`messages` holds more than {MAX_MESSAGES} messages, or more than {MAX_MESSAGES} parts",
        param="messages",
        code="too_large",
    )


def _check_tokens(name: str, text: bytes, bounds: Bounds, others: dict[str, Any]) -> None:
    count = text.count(b",") + 1
    if count > bounds.tokens:
        raise bad_request(
            f"`{name}` lists {count} tokens, more than a text of this model can have, {bounds.tokens}",
            param=name,
            code="too_large",
        )


def _check_prompt(name: str, text: bytes, bounds: Bounds, others: dict[str, Any]) -> None:
    """Texts are measured later, where the tokenizer is known; here only how many there are."""
    first = _first(text) if text[:1] == b"[" else b""
    count, n = 0, others.get("n") or 1
    if first == b"[":
        count = text.count(b"[") - 1
    elif first == b'"':
        count = _strings_at_least(text)
    elif first and others.get("truncate_prompt_tokens") is None:
        tokens = text.count(b",") + 1
        if tokens > bounds.tokens:
            raise too_long(tokens, bounds.tokens, name)
    if count * max(1, n) > bounds.prompts:
        raise too_many_prompts(count, n, bounds.prompts, name)


_CHECKS: dict[str, Callable[[str, bytes, Bounds, dict[str, Any]], None]] = {
    "stop_token_ids": _check_ids,
    "allowed_token_ids": _check_ids,
    "logit_bias": _check_ids,
    "stop": _check_stop,
    "messages": _check_messages,
    "tokens": _check_tokens,
    **dict.fromkeys(_PROMPT_FIELDS, _check_prompt),
}


def _check_off(name: str, text: bytes) -> None:
    """Raises ApiError for a field that we do not act on, unless it is off."""
    if len(text) <= _TINY:
        value = _read(_ANY, text, name)
        if any(value == off and isinstance(value, bool) is isinstance(off, bool) for off in OFF[name].values):
            return
    raise bad_request(f"`{name}` is not supported by this server", param=name, code="unsupported_field")


_ANY: msgspec.json.Decoder[Any] = msgspec.json.Decoder()
_MESSAGE_OFF = ("tool_calls", "tool_call_id", "function_call", "audio")
_MESSAGE_EXTRAS = ("name", "refusal", "annotations", "reasoning", "reasoning_content")


def message_extras(message: Message, where: str) -> dict[str, Any]:
    """The keys of a message beside its role and content. Raises ApiError for those that we do not act on.

    Keys with null or empty values pass, since clients send back whole answers as history.
    """
    out: dict[str, Any] = {}
    for name in _MESSAGE_OFF:
        text = bytes(getattr(message, name))
        if text and (len(text) > _TINY or _read(_ANY, text, "messages") not in (None, [])):
            raise bad_request(
                f"{where}.{name}: tool calls and audio are not supported by this server", param="messages"
            )
    for name in _MESSAGE_EXTRAS:
        text = bytes(getattr(message, name))
        if text[:1] != b'"' and len(text) > _TINY:
            raise bad_request(f"{where}.{name} is larger than {_TINY} bytes", param="messages", code="too_large")
        value = _read(_ANY, text, "messages") if text else None
        if value is not None and value != []:
            out[name] = value
    return out


def _unknown(name: str, field: str, known: tuple[str, ...]) -> NoReturn:
    name = name[:64]
    if field:
        raise bad_request(
            f"`{field}` has an unknown field `{name}`", param=field.partition("[")[0], code="unknown_field"
        )
    near = difflib.get_close_matches(name, [*known, *HARMLESS, *OFF], n=1, cutoff=0.7)
    hint = f"; did you mean `{near[0]}`?" if near else ""
    raise bad_request(f"unknown field `{name}`{hint}", param=name, code="unknown_field")


def _explain(message: str, field: str, known: tuple[str, ...]) -> ApiError:
    """msgspec's "Expected `int | null`, got `str` - at `$[3]`" in our error shape. `known`: fields of the request."""
    text, _, path = message.rpartition(" - at ") if " - at " in message[-200:] else (message, "", "")
    place = field + (path.rpartition("`$")[2].rstrip("`") if path else "")
    unknown = re.fullmatch(r"Object contains unknown field `(.*)`", text, re.DOTALL)
    if unknown is not None:
        _unknown(unknown[1], place, known)
    if not field:
        return bad_request("the body must be a JSON object", code="json")
    missing = re.fullmatch(r"Object missing required field `(\w+)`", text)
    if missing is not None:
        return bad_request(f"`{place}.{missing[1]}` is required", param=field, code="missing_field")
    if field == "logit_bias" and "`key`" in path:
        return bad_request("`logit_bias`: keys must be token ids", param=field, code="invalid_type")
    if re.fullmatch(r"messages\[(\d+|\.\.\.)\]\.content\[(\d+|\.\.\.)\]", place):
        return bad_request(f'`{place}` must be an object with a "type"', param=field, code="invalid_type")
    return bad_request(f"`{place}`: {text[0].lower()}{text[1:]}", param=field, code="invalid_type")
