"""`State`: the running softmax of the rows of a query block; and the sizes of query blocks, KV blocks and chunks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from xllm_compiler.kernels.tir.codegen.builder import load, splat, stack_array, store
from xllm_compiler.kernels.tir.codegen.kernel import TILE_TOKENS
from xllm_compiler.kernels.tir.isa.levels import LANES

Expr = Any
BLOCK = 64
CHUNK = 512  # tokens of one softmax, which one member computes
QUERY_ROWS = 48
BLOCK_PAGES = BLOCK // TILE_TOKENS


@dataclass(frozen=True)
class Item:
    """A query block: rows `first` .. `first + rows - 1` of a request, which see KV blocks first_block .. last_block."""

    request: Expr
    first: Expr
    rows: Expr
    first_block: Expr
    last_block: Expr


class State:
    """The maximum, sums by lane and weighted values of each row of a query block.

    There are twice QUERY_ROWS rows: first the state after all chunks so far, then that of the current chunk.
    """

    def __init__(self, value_vectors: int) -> None:
        self.value_vectors = value_vectors
        self.maxima = stack_array(2 * QUERY_ROWS, "float32")
        self.sums = stack_array(2 * QUERY_ROWS * LANES, "float32")
        self.totals = stack_array(2 * QUERY_ROWS * value_vectors * LANES, "float32")

    def begin(self, row: Expr) -> None:
        """Emits the state of a row that has seen nothing. Values are -0, which changes nothing that is added to it. So
        merging the first chunk into it gives that chunk."""
        T.buffer_store(self.maxima, T.float32(float("-inf")), [row])
        store(self.sums, row * LANES, splat(0.0), "f32")
        for i in range(self.value_vectors):
            store(self.totals, self.total(row, i), splat(-0.0), "f32")

    def total(self, row: Expr, vector: int) -> Expr:
        """The index of one vector of a row's values in `totals`."""
        return (row * self.value_vectors + vector) * LANES

    def place(self, row: Expr, index: int) -> tuple[Expr, Expr]:
        """Buffer and index of a row's sums (0) or of vector index - 1 of its values."""
        return (self.sums, row * LANES) if index == 0 else (self.totals, self.total(row, index - 1))

    def reader(self, row: Expr) -> tuple[Callable[[], Expr], Callable[[int], Expr]]:
        """Two functions: one reads a row's maximum, the other the vector that `place(row, index)` names."""
        return lambda: self.maxima[row], lambda i: load(*self.place(row, i), "f32")
