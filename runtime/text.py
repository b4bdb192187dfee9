"""The text of a growing token list, and what of it may be shown: no partial character, no possible stop string, nothing
after one.

What was shown never changes: the pieces joined are the answer's text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from xllm_compiler.runtime.stops import StopWatch, StopWords

CONTEXT = 6  # prompt tokens that decide, in some tokenizers, whether the answer's first token starts with a space
_WINDOW = 64  # tokens after which bytes that make no character are shown as U+FFFD


class Decoder(Protocol):
    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...


class TextStream:
    """Tokens in, showable text out.

    A window of the latest tokens is decoded again for each new one; it moves on whenever it ends in a whole character.
    The piece before the last one stays in it as context, since a decoder may treat the start of a text differently.
    """

    __slots__ = (
        "_decoder",
        "_held",
        "_include_stop",
        "_settled",
        "_shown",
        "_skip_special",
        "_stops",
        "_unsearched",
        "_watch",
        "_window",
        "added",
        "stopped_by",
    )

    def __init__(
        self,
        decoder: Decoder,
        prompt: Sequence[int],
        *,
        stops: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
    ) -> None:
        self._decoder = decoder
        self._stops = stops if isinstance(stops, StopWords) else StopWords(stops)
        self._watch = StopWatch(self._stops)
        self._unsearched = False  # a stop string ended where none was looked for
        self._include_stop = include_stop
        self._skip_special = skip_special_tokens
        self._window = list(prompt[-CONTEXT:])
        self._settled = len(self._window)  # tokens of the window whose text was given out whole
        self._shown = len(self._decode(self._window))  # characters of the window's text that were given out
        self._held = ""  # given out by the decoder, kept back because a stop string may begin in it
        self.stopped_by: str | None = None
        self.added = ""  # by the last token, before anything was kept back for a stop string

    def _decode(self, ids: Sequence[int]) -> str:
        return self._decoder.decode(ids, skip_special_tokens=self._skip_special)

    def push(self, token: int, *, may_stop: bool = True) -> str:
        """Add a token; the text that may be shown now. `may_stop` false: stop strings are not looked for yet."""
        self.added = self._grow(token)
        return self._release(self.added, may_stop)

    def _grow(self, token: int) -> str:
        self._window.append(token)
        text = self._decode(self._window)
        # An unfinished character shows as U+FFFD: once, or (byte tokens) once for each byte of the run that it ends,
        # even for those of whole characters. So all of them at the end wait.
        unfinished = 0
        if len(self._window) - self._settled < _WINDOW:
            unfinished = len(text) - len(text.rstrip("\ufffd"))
        new = text[self._shown : len(text) - unfinished]
        self._shown += len(new)
        # Tokens without text are no context to decode the next one after, so the window waits for some.
        if not unfinished and (new or len(self._window) - self._settled >= _WINDOW):
            del self._window[: self._settled]
            self._settled = len(self._window)
            self._shown = len(self._decode(self._window))
        return new

    def _release(self, new: str, may_stop: bool) -> str:
        if not self._stops:
            return new
        text = self._held + new
        self._unsearched = self._watch.feed(new) or self._unsearched
        if may_stop and self._unsearched:
            self._unsearched = False
            found = min(((at, stop) for stop in self._stops if (at := text.find(stop)) >= 0), default=None)
            if found is not None:
                at, self.stopped_by = found
                self._held = ""
                return text[: at + len(self.stopped_by)] if self._include_stop else text[:at]
        keep = self._watch.held
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """The rest, when no more tokens come: bytes that make no character show as U+FFFD."""
        self.added = ""
        if self.stopped_by is not None:
            return ""
        rest = self._decode(self._window)[self._shown :]
        self._shown += len(rest)
        self.added = rest
        text, self._held = self._held + rest, ""
        return text
