"""A prompt that is to become an embedding, while the engine works on it."""

from __future__ import annotations

from xllm_compiler.runtime.base_sequence import BaseSequence
from xllm_compiler.runtime.executor import Outputs
from xllm_compiler.runtime.kv import BlockTable
from xllm_compiler.runtime.outputs import Output
from xllm_compiler.runtime.pooling import Pooler, PoolingParams
from xllm_compiler.runtime.request import SequenceGroup
from xllm_compiler.step.interface import HIDDEN, Pooling


class PooledSequence(BaseSequence):
    """It ends with its prompt: nothing is sampled. Rows that were pooled are not asked for again after a preemption."""

    __slots__ = ("_known", "_pooler")

    def __init__(self, group: SequenceGroup, serial: int, table: BlockTable, pooling: Pooling) -> None:
        params = group.request.params
        assert isinstance(params, PoolingParams)
        self._pooler = Pooler(pooling, params.dimensions)
        self._known = self._pooler.tokens(len(group.prompt))
        super().__init__(group, 0, serial, table, self._pooler.first_row(len(group.prompt)))

    @property
    def known(self) -> int:
        return self._known

    def take(self, first: int, outputs: Outputs, rows: range, draft: list[int], events: list[Output]) -> int:
        hidden = outputs[HIDDEN][rows.start : rows.stop]
        self._pooler.add(hidden)
        self.first_row = min(max(self.first_row, first + len(hidden)), self._known - 1)
        if self.computed == self._known:
            event = self.end("stop")
            event.embedding = self._pooler.result()
            events.append(event)
        return 0
