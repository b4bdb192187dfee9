"""Makes JSON of long lists of log-probabilities, piece by piece, so that the event loop serves others in between.

A row is dropped once it is JSON, so both are never in memory together. The shapes are in `logprobs.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec
from msgspec import Raw

from xllm_compiler.runtime.outputs import Logprob, LogprobDict
from xllm_compiler.runtime.server import logprobs
from xllm_compiler.runtime.server.responses import ChatLogprobs, CompletionLogprobs, TokenLogprob

_ROWS = 16  # of 21 entries each: half a millisecond
_encode = msgspec.json.Encoder().encode


async def completion_logprobs(
    out: CompletionLogprobs, token_ids: Sequence[int], rows: list[LogprobDict], *, offset: int, as_ids: bool
) -> None:
    """Append these tokens to `out`, and empty `rows`. `offset`: where the first one begins in the choice's text."""
    for start in range(0, len(rows), _ROWS):
        end = min(start + _ROWS, len(rows))
        ids, some = token_ids[start:end], rows[start:end]
        logprobs.extend(out, encoded(logprobs.completion_logprobs(ids, some, offset=offset, as_ids=as_ids)))
        offset += logprobs.shown_length(ids, some)
        rows[start:end] = [{}] * (end - start)
        await asyncio.sleep(0)
    rows.clear()


async def prompt_completion_logprobs(
    token_ids: Sequence[int], rows: list[LogprobDict | None], *, first: Logprob, as_ids: bool
) -> CompletionLogprobs:
    """The legacy shape for an echoed prompt, whose first token has the entry `first`."""
    out = logprobs.prompt_completion_logprobs(token_ids[:1], rows[:1], first=first, as_ids=as_ids)
    scored = [row for row in rows[1:] if row is not None]
    offset = logprobs.shown_characters(first)
    await completion_logprobs(out, token_ids[1:], scored, offset=offset, as_ids=as_ids)
    return out


async def chat_logprobs(token_ids: Sequence[int], rows: list[LogprobDict], *, top: int, as_ids: bool) -> ChatLogprobs:
    """The chat shape for these tokens; empties `rows`."""
    out = ChatLogprobs([])
    for start in range(0, len(rows), _ROWS):
        end = min(start + _ROWS, len(rows))
        more = logprobs.chat_logprobs(token_ids[start:end], rows[start:end], top=top, as_ids=as_ids)
        out.content += [Raw(_encode(item)) for item in more.content]
        rows[start:end] = [{}] * (end - start)
        await asyncio.sleep(0)
    rows.clear()
    return out


async def prompt_logprobs(rows: Sequence[LogprobDict | None]) -> list[dict[str, TokenLogprob] | Raw | None]:
    """vLLM's `prompt_logprobs`."""
    out: list[dict[str, TokenLogprob] | Raw | None] = []
    for start in range(0, len(rows), _ROWS):
        more = logprobs.prompt_logprobs(rows[start : start + _ROWS])
        out += [None if row is None else Raw(_encode(row)) for row in more]
        await asyncio.sleep(0)
    return out


def encoded(more: CompletionLogprobs) -> CompletionLogprobs:
    """The same with its alternatives as JSON."""
    more.top_logprobs = [Raw(_encode(top)) if isinstance(top, dict) else top for top in more.top_logprobs]
    return more
