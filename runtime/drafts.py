"""Drafts: tokens that somebody expects a sequence to go on with. The engine runs them behind the next decode and keeps
those that it draws itself, so an answer is the same with any draft or none; a good one saves steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from xllm_compiler.runtime import sequence


class Drafter(Protocol):
    """Proposes drafts. Called on the engine's thread, before each step, for every sequence whose prompt is computed."""

    def propose(self, of: sequence.Sequence, most: int) -> Sequence[int]:
        """At most `most` token ids to follow `of`'s known tokens; empty for none."""
        ...
