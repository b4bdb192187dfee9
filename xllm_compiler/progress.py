"""Who watches a compile: `Progress`, and `Silent`, which shows nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Progress(Protocol):
    """Whoever watches a compile."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Entered around each phase."""

    def advance(self, what: str, done: float) -> None:
        """The running phase now does `what`; `done`, 0 to 1, of it is behind us."""

    def note(self, text: str) -> None:
        """Something that the user should know."""


class Silent:
    """A Progress that shows nothing."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Shows nothing."""
        yield

    def advance(self, what: str, done: float) -> None:
        """Shows nothing."""

    def note(self, text: str) -> None:
        """Shows nothing."""
