"""Log-probabilities in the two shapes that OpenAI's API has. Owns the shapes' details; must not know requests.

JSON has no infinity, so a token that the model rules out is written as -9999.0, as vLLM does.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Raw

from xllm_compiler.runtime.outputs import Logprob, LogprobDict
from xllm_compiler.runtime.server.responses import (
    ChatLogprobs,
    ChatTokenLogprob,
    ChatTopLogprob,
    CompletionLogprobs,
    TokenLogprob,
)

LOWEST = -9999.0


def _finite(value: float) -> float:
    return max(value, LOWEST)


def _text(token: int, entry: Logprob, as_ids: bool) -> str:
    if as_ids or entry.decoded_token is None:
        return f"token_id:{token}"
    return entry.decoded_token


def completion_logprobs(
    token_ids: Sequence[int], rows: Sequence[LogprobDict | None], *, offset: int, as_ids: bool
) -> CompletionLogprobs:
    """The legacy shape for these tokens; `offset` is the place of the first one in the choice's text, in characters.

    `top_logprobs` is keyed by text, and two ids can share one text; the likelier wins, so that its largest value is
    always the model's best token, which is how evaluation tools tell a greedy match. An alternative that would leave a
    character unfinished is named by its bytes.
    """
    out = CompletionLogprobs([], [], [], [])
    for token, row in zip(token_ids, rows, strict=True):
        if row is None:
            raise ValueError("a row without log-probabilities; use `prompt_rows` for a prompt's first token")
        text = _text(token, row[token], as_ids)
        top: dict[str, float] = {}
        for other, entry in row.items():
            name = text if other == token else _text(other, entry, as_ids) or _bytes_name(entry)
            top[name] = max(top.get(name, LOWEST), _finite(entry.logprob))
        _append(out, text, offset, _finite(row[token].logprob), top)
        offset += shown_characters(row[token])
    return out


def shown_characters(entry: Logprob) -> int:
    """How many characters of the text are this token's."""
    return len(entry.decoded_token or "") if entry.shown else 0


def shown_length(token_ids: Sequence[int], rows: Sequence[LogprobDict | None]) -> int:
    """How many characters of the text are these tokens'."""
    return sum(shown_characters(row[token]) for token, row in zip(token_ids, rows, strict=True) if row is not None)


def _bytes_name(entry: Logprob) -> str:
    """OpenAI's name for a token that is no text."""
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in entry.token_bytes or b"")


def prompt_completion_logprobs(
    token_ids: Sequence[int], rows: Sequence[LogprobDict | None], *, first: Logprob, as_ids: bool
) -> CompletionLogprobs:
    """The legacy shape for an echoed prompt: its first token has no prediction, so two nulls stand there. `first` is
    that token's entry."""
    out = CompletionLogprobs([], [], [], [])
    if not token_ids:
        return out
    _append(out, _text(token_ids[0], first, as_ids), 0, None, None)
    offset = shown_characters(first)
    extend(out, completion_logprobs(token_ids[1:], rows[1:], offset=offset, as_ids=as_ids))
    return out


def _append(
    out: CompletionLogprobs, text: str, offset: int, logprob: float | None, top: dict[str, float] | None
) -> None:
    out.tokens.append(text)
    out.text_offset.append(offset)
    out.token_logprobs.append(logprob)
    out.top_logprobs.append(top)


def extend(out: CompletionLogprobs, more: CompletionLogprobs) -> None:
    """Append `more` to `out`."""
    out.tokens += more.tokens
    out.text_offset += more.text_offset
    out.token_logprobs += more.token_logprobs
    out.top_logprobs += more.top_logprobs


def chat_logprobs(token_ids: Sequence[int], rows: Sequence[LogprobDict], *, top: int, as_ids: bool) -> ChatLogprobs:
    """The chat shape for these tokens, with the `top` most likely alternatives of each."""
    content: list[ChatTokenLogprob | Raw] = []
    for token, row in zip(token_ids, rows, strict=True):
        ranked = sorted(row.items(), key=lambda item: (-item[1].logprob, item[0]))[:top]
        alternatives = [ChatTopLogprob(*_chat_entry(other, entry, as_ids)) for other, entry in ranked]
        content.append(ChatTokenLogprob(*_chat_entry(token, row[token], as_ids), top_logprobs=alternatives))
    return ChatLogprobs(content)


def _chat_entry(token: int, entry: Logprob, as_ids: bool) -> tuple[str, float, list[int] | None]:
    own = entry.token_bytes
    return _text(token, entry, as_ids), _finite(entry.logprob), None if own is None else list(own)


def prompt_logprobs(rows: Sequence[LogprobDict | None]) -> list[dict[str, TokenLogprob] | None]:
    """vLLM's `prompt_logprobs`: per position a mapping from token id to its entry, null for the first."""
    return [
        None
        if row is None
        else {str(token): TokenLogprob(_finite(e.logprob), e.rank, e.decoded_token) for token, e in row.items()}
        for row in rows
    ]
