"""What the engine's loop sees of a sequence: its prompt, its place, its KV pages. What its rows become is another's."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

from xllm_compiler.errors import XllmError
from xllm_compiler.runtime.executor import Outputs
from xllm_compiler.runtime.kv import BlockTable
from xllm_compiler.runtime.outputs import Output
from xllm_compiler.runtime.request import SequenceGroup


class BaseSequence(ABC):
    """A token list that begins with the prompt. `function`, `known`, `computed`, `first_row`, `drafted` and `pages` are
    what the scheduler sees."""

    __slots__ = (
        "broken",
        "computed",
        "draft",
        "first_row",
        "function",
        "group",
        "index",
        "prompt_len",
        "serial",
        "table",
    )

    def __init__(self, group: SequenceGroup, index: int, serial: int, table: BlockTable, first_row: int) -> None:
        """`serial`: its place in the order of arrival. `first_row`: the first position whose row is wanted."""
        self.group = group
        self.function = group.request.params.function
        self.index = index
        self.serial = serial
        self.table = table
        self.prompt_len = len(group.prompt)
        self.computed = 0
        self.draft: list[int] = []  # tokens that somebody expects behind the known ones
        self.first_row = first_row
        self.broken: XllmError | None = None  # why it has no text from some event on

    @property
    @abstractmethod
    def known(self) -> int:
        """Tokens so far."""

    @property
    def drafted(self) -> int:
        return len(self.draft)

    @property
    def pages(self) -> int:
        return self.table.count

    def token(self, position: int) -> int:
        """The token at a position below `known`."""
        return int(self.group.prompt[position])

    def span(self, low: int, high: int) -> NDArray[np.int32]:
        """The tokens at positions low .. high - 1: known ones, and behind them those of the draft."""
        return self.group.prompt[low:high]

    @abstractmethod
    def take(self, first: int, outputs: Outputs, rows: range, draft: list[int], events: list[Output]) -> int:
        """Use the `rows` of a step's outputs, of the positions from `first` on; `events` gets what there is to tell.
        How many tokens of `draft`, which the step was run with, turned out right. Raises XllmError."""

    def end(self, reason: str, error: XllmError | None = None) -> Output:
        """Finish without another token: "abort", "error", or "length" when none was wanted."""
        event = self._event()
        event.finish_reason, event.error = reason, error
        return event

    def put_text(self, event: Output) -> None:  # noqa: B027 (not everybody tells text)
        """Add the text to an event, when it is delivered; each event once, in order, on any thread."""

    def _event(self) -> Output:
        return Output(self.group.request.request_id, self.index)
