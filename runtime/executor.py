"""The border between engine and target. Owns the shape of a step's inputs; must not know requests, pages or
policies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from xllm_compiler.artifact.schema import BLOCK

I32 = NDArray[np.int32]
F32 = NDArray[np.float32]


class StepBatch:
    """The inputs of one step in buffers that are allocated once (docs/architecture.md, "The step function").

    Only the first `n` tokens, `b` requests (`start` has b + 1 entries) and `s` sampled rows are meaningful. `width` is
    the number of pages of the longest request that the compiled step was told of; `table` is [max_seqs, width], C
    order.
    """

    __slots__ = ("b", "ids", "n", "pos", "s", "sel", "seq", "start", "table")

    def __init__(self, max_tokens: int, max_seqs: int, max_rows: int, width: int) -> None:
        self.n = self.b = self.s = 0
        self.ids: I32 = np.zeros(max_tokens, np.int32)
        self.pos: I32 = np.zeros(max_tokens, np.int32)
        self.seq: I32 = np.zeros(max_tokens, np.int32)
        self.start: I32 = np.zeros(max_seqs + 1, np.int32)
        self.table: I32 = np.full((max_seqs, width), -1, np.int32)
        self.sel: I32 = np.zeros(max_rows, np.int32)

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in (self.ids, self.pos, self.seq, self.start, self.table, self.sel))


@dataclass(frozen=True, slots=True)
class Logits:
    """The logits of a step: `rows` [s, vocabulary], and `maxima` [s, ceil(vocabulary / BLOCK)].

    A maximum is the largest value of a block of BLOCK columns, NaN where one of them is. The last block may be short.
    """

    rows: F32
    maxima: F32

    @classmethod
    def of(cls, rows: F32) -> Logits:
        """Rows whose maxima nobody has found yet."""
        if not len(rows):
            return cls(rows, np.zeros((0, -(-rows.shape[1] // BLOCK)), np.float32))
        return cls(rows, np.maximum.reduceat(rows, range(0, rows.shape[1], BLOCK), axis=1))


class Executor(Protocol):
    """Runs steps. Not thread-safe: one thread calls it."""

    pages: int

    def new_batch(self) -> StepBatch:
        """Input buffers of the sizes this executor was compiled for."""
        ...

    def execute(self, batch: StepBatch) -> Logits:
        """Run one step; views that the next call overwrites. Raises XllmError("internal")."""
        ...

    def close(self) -> None:
        """Free threads and memory. Safe to call twice."""
        ...
