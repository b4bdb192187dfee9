"""A tensor of a GGUF file as one of the model: its values in the model's order, and its integers where they can stay.

llama.cpp's converter changed some tensors for its own code: rows of q and k of Llama, and the weights of Gemma's norms.
Reading takes that back. A tensor is read in pieces, so that memory holds its result and little more.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from xllm_compiler.frontend.gguf.blocks import BLOCKS, Block, scales
from xllm_compiler.frontend.quantized_weight import StoredWeight
from xllm_compiler.frontend.safetensors import Array, TensorEntry
from xllm_compiler.ir.semantics import NP_DTYPE
from xllm_compiler.weight_formats import IntegerFormat

_PIECE: Final = 1 << 20  # values unpacked in one go


@dataclass(frozen=True, slots=True)
class GgufEntry(TensorEntry):
    """`dtype` is the type in the file, such as "Q4_K". `heads`: the rows of each of so many heads are in llama.cpp's
    order, pairs of a rotation side by side; 0: rows are as they should be. `added`: what was added to every value."""

    heads: int = 0
    added: float = 0.0

    @property
    def block(self) -> Block:
        return BLOCKS[self.dtype]

    @property
    def in_blocks(self) -> bool:
        return self.block.values > 1

    def read(self, first: int = 0, count: int | None = None) -> Array:
        """In f32, or the 16 bits that are stored."""
        flat = self.floats(NP_DTYPE[{"F16": "f16", "BF16": "bf16"}.get(self.dtype, "f32")]).reshape(-1)[first:]
        return flat if count is None else flat[:count]

    def floats(self, dtype: np.dtype[Any]) -> Array:
        """Every value, computed in f32 and rounded once."""
        out = np.empty(self.shape, dtype)
        flat = out.reshape(-1, self.shape[-1])
        for rows, blocks in self.pieces():
            values = self.block.floats(blocks).reshape(-1, self.shape[-1])
            with np.errstate(over="ignore"):  # an infinity is found, and blamed, by whoever reads weights
                flat[rows] = values - np.float32(self.added) if self.added else values
        return out

    def pieces(self) -> Iterator[tuple[Array, Array]]:
        """Some rows after the others: their numbers in the model's order, and their blocks, u8 [n, bytes]."""
        block = self.block
        order = self._order()
        width = self.shape[-1] // block.values * block.nbytes
        step = max(1, _PIECE // self.shape[-1])
        for start in range(0, len(order), step):
            rows = order[start : start + step]
            data = self.stored(np.dtype(np.uint8), start * width, len(rows) * width)
            yield rows, data.reshape(-1, block.nbytes)

    def _order(self) -> Array:
        """Which row of the model each stored row is."""
        count = int(np.prod(self.shape[:-1], dtype=np.int64))
        if not self.heads:
            return np.arange(count)
        # Row 2 i + j of a head is row j * half + i of the model's.
        return np.arange(count).reshape(self.heads, 2, -1).swapaxes(1, 2).reshape(-1)


@dataclass(frozen=True)
class BlockWeight(StoredWeight):
    """The weight of a layer, or an embedding table, in blocks."""

    name: str
    shape: tuple[int, ...]
    entry: GgufEntry

    @classmethod
    def of(cls, entry: GgufEntry) -> BlockWeight:
        return cls(entry.name, entry.shape, entry)

    @property
    def why(self) -> str:
        why = self.entry.block.why
        return f"{self.entry.dtype} {why}" if why else ""

    @property
    def entries(self) -> Iterable[TensorEntry]:
        return (self.entry,)

    def check(self) -> None:
        """The file's table was checked when it was read."""

    @property
    def format(self) -> IntegerFormat:
        found = self.entry.block.format
        assert found is not None
        return found

    def values(self) -> Array:
        block = self.entry.block
        assert block.integers is not None
        out = np.empty(self.shape, np.uint8)
        for rows, blocks in self.entry.pieces():
            out[rows] = block.integers(blocks).reshape(len(rows), -1)
        return out

    def scales(self) -> Array:
        out = np.empty((self.shape[0], self.shape[1] // self.entry.block.values), np.float16)
        for rows, blocks in self.entry.pieces():
            out[rows] = scales(blocks).reshape(len(rows), -1)
        return out

    def zeros(self) -> Array:
        raise AssertionError(f"{self.entry.dtype} has no zero points")

    def floats(self, dtype: str) -> Array:
        return self.entry.floats(NP_DTYPE[dtype])
