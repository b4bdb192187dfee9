"""The strings and bytes of single tokens, for log-probabilities.

A token's string is what it adds to the text, so that the strings join to the text. Half a character adds nothing; the
token that completes it adds all of it. A token's bytes are its own, half characters included, so that the bytes join to
the text's too. A special token that is not shown has its name as string, and no bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from xllm_compiler.runtime.outputs import Logprob, LogprobDict
from xllm_compiler.runtime.text import TextStream

_LONGEST = 256  # bytes without a character that are remembered; no character has more than four


class Speller(Protocol):
    """What this needs of `runtime.tokenizer.Tokenizer`."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...
    def token_bytes(self, token: int) -> bytes: ...
    def special_name(self, token: int) -> str | None: ...
    @property
    def context(self) -> Sequence[int]: ...


class TokenNames:
    """Names the tokens of one growing text, each in its place."""

    __slots__ = ("_pending", "_speller")

    def __init__(self, speller: Speller) -> None:
        self._speller = speller
        self._pending = b""  # of an unfinished character

    def name(self, row: LogprobDict, token: int, added: str | None) -> None:
        """Fill in the strings and bytes of a row of alternatives, `token` the one that was taken. `added`: what that
        one added to the text; None for one that is no part of it, such as the end of the text."""
        pending = self._pending
        for other, entry in row.items():
            if other == token:
                entry.decoded_token, entry.token_bytes, entry.shown = self.take(token, added)
            else:
                entry.decoded_token, entry.token_bytes = self._would_add(other, pending)

    def take(self, token: int, added: str | None) -> tuple[str, bytes, bool]:
        """A token of the text that adds `added`: its string, its bytes, and whether they are part of the text."""
        special = self._speller.special_name(token)
        if added is None or (special is not None and not added):
            name = special if special is not None else self._would_add(token, b"")[0]
            return name, b"", False
        own = self._speller.token_bytes(token)
        text = added.encode("utf-8", "replace")
        whole = self._pending + own
        if whole.startswith(text) and _is_unfinished(whole[len(text) :]):
            self._pending = whole[len(text) :][-_LONGEST:]
        else:  # bytes that make no character, or a space that the start of a text loses
            own = own if self._pending or "\ufffd" in added else text
            self._pending = b""
        return added, own, True

    def _would_add(self, token: int, pending: bytes) -> tuple[str, bytes]:
        special = self._speller.special_name(token)
        if special is not None:
            return special, special.encode()
        own = self._speller.token_bytes(token)
        whole = pending + own
        try:
            return whole.decode(), own
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data":
                return whole[: error.start].decode(), own
            return whole.decode("utf-8", "replace"), own


def _is_unfinished(rest: bytes) -> bool:
    """Whether bytes that the text does not show yet may still become characters; those that are some never will."""
    try:
        return not rest.decode()
    except UnicodeDecodeError:
        return True


def name_prompt(
    speller: Speller, ids: Sequence[int], rows: Sequence[LogprobDict | None], skip_special_tokens: bool
) -> None:
    """Name the log-probabilities of a prompt's tokens, as they read within a text.

    A prompt of token ids may begin with a space, which tells two tokens apart.
    """
    stream = TextStream(speller, speller.context, skip_special_tokens=skip_special_tokens)
    names = TokenNames(speller)
    last: Logprob | None = None
    for token, row in zip(ids, rows, strict=True):
        stream.push(token)
        if row is None:
            names.take(token, stream.added)
        else:
            names.name(row, token, stream.added)
            last = row[token]
    rest = stream.finish()
    if rest and last is not None:
        append_rest(last, rest)


def drop_first_space(first: Logprob, ids: Sequence[int], rows: Sequence[LogprobDict | None], text: str) -> None:
    """Drop the space that the tokenizer put before a prompt that was given as text.

    The first token that is part of the text loses it. `first` is the entry of the first token, which has no row.
    """
    entries = [first, *(row[token] for token, row in zip(ids[1:], rows[1:], strict=True) if row is not None)]
    shown = [entry for entry in entries if entry.shown and entry.decoded_token]
    if shown and "".join(entry.decoded_token or "" for entry in shown) == " " + text:
        shown[0].decoded_token = (shown[0].decoded_token or "")[1:]


def append_rest(last: Logprob, rest: str) -> None:
    """Give the last token `rest`: the text that is left when no more tokens come, bytes that make no character."""
    last.decoded_token = (last.decoded_token or "") + rest if last.shown else rest
    last.shown = True


def first_entry(speller: Speller, token: int, alone: bool, skip_special_tokens: bool) -> Logprob:
    """The string of a prompt's first token, which nothing predicts. `alone`: no token follows it."""
    stream = TextStream(speller, speller.context, skip_special_tokens=skip_special_tokens)
    stream.push(token)
    text, own, shown = TokenNames(speller).take(token, stream.added)
    return Logprob(0.0, None, text + (stream.finish() if alone else ""), own, shown)
