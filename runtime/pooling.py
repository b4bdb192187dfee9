"""From hidden states to an embedding: what a request asks for, and the sums. Owns the order in which numbers are added:
an embedding's bits depend on the prompt alone, not on how it was cut into steps or who else was in them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from xllm_compiler.errors import XllmError
from xllm_compiler.runtime.executor import F32
from xllm_compiler.runtime.model_info import ModelInfo
from xllm_compiler.step.interface import EMBED, Pooling

_TINY = 1e-12  # the least length that is divided by, as in torch.nn.functional.normalize


@dataclass(slots=True)
class PoolingParams:
    """What a request asks of an embedding, under vLLM's names. `dimensions`: cut it to so many numbers, where the
    checkpoint was trained for that."""

    dimensions: int | None = None

    @property
    def function(self) -> str:
        """The function that such a request runs."""
        return EMBED

    @property
    def n(self) -> int:
        """Embeddings of each prompt."""
        return 1

    @property
    def nbytes(self) -> int:
        """Bytes of its lists: it has none."""
        return 0

    def check_size(self, info: ModelInfo) -> None:
        """Raises XllmError("request") for a size that the model's embeddings do not have."""
        size, pooling = self.dimensions, info.pooling
        if size is None or pooling is None:
            return
        if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= info.embedding_size:
            raise _refused(f"dimensions must be an integer from 1 to {info.embedding_size}, got {str(size)[:40]}")
        if size == info.embedding_size:
            return
        if pooling.dimensions is None:
            raise _refused(
                f"this model's embeddings have {info.embedding_size} numbers, and it was not trained to have them cut"
            )
        if pooling.dimensions and size not in pooling.dimensions:
            sizes = ", ".join(map(str, pooling.dimensions))
            raise _refused(f"this model's embeddings can be cut to {sizes} numbers, not to {size}")


def _refused(message: str) -> XllmError:
    return XllmError("request", message, where="dimensions")


class Pooler:
    """Makes the embedding of one prompt from its rows of hidden states, which come in order, in any pieces."""

    __slots__ = ("_pooling", "_rows", "_size", "_sum")

    def __init__(self, pooling: Pooling, size: int | None) -> None:
        """`size`: how many numbers are wanted; None for all."""
        self._pooling = pooling
        self._size = size
        self._rows = 0
        self._sum: np.ndarray[tuple[int], np.dtype[np.float64]] | None = None

    def tokens(self, prompt: int) -> int:
        """How many of a prompt's tokens have to be computed: of a causal model, the first one does not see others."""
        return 1 if self._pooling.kind == "cls" else prompt

    def first_row(self, prompt: int) -> int:
        """The first position whose hidden state counts."""
        return 0 if self._pooling.kind == "mean" else self.tokens(prompt) - 1

    def add(self, rows: F32) -> None:
        """Take in the next rows, [s, width]."""
        for row in rows:  # one after the other: numpy's own sum would depend on how many there are
            if self._sum is None:
                self._sum = row.astype(np.float64)
            else:
                self._sum += row
        self._rows += len(rows)

    def result(self) -> F32:
        """The embedding of all rows, f32[size]. Raises XllmError("internal") where it is not finite."""
        assert self._sum is not None
        vector = (self._sum / self._rows)[: self._size]
        if not np.isfinite(vector).all():
            raise XllmError("internal", "the model computed hidden states that are not finite")
        if self._pooling.normalize:
            vector = vector / max(float(np.sqrt(np.add.reduce(vector * vector))), _TINY)
        return vector.astype(np.float32)
