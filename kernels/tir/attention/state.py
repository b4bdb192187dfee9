"""What attention knows of the rows of a query block while it walks over the cache: `State`; and the sizes of both."""

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
CHUNK = 512  # tokens that are one softmax; the unit of sharing out a row
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
    """What is known of the rows of a query block: maximum, sums by lane and weighted values.

    Twice QUERY_ROWS places: what all chunks so far have left, then what the chunk at hand does.
    """

    def __init__(self, value_vectors: int) -> None:
        self.value_vectors = value_vectors
        self.maxima = stack_array(2 * QUERY_ROWS, "float32")
        self.sums = stack_array(2 * QUERY_ROWS * LANES, "float32")
        self.totals = stack_array(2 * QUERY_ROWS * value_vectors * LANES, "float32")

    def begin(self, row: Expr) -> None:
        """Nothing seen yet. Values are -0, to which anything may be added without a change, so that merging a first
        chunk into nothing gives that chunk."""
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
        """Functions that read a row's maximum and what `place` names."""
        return lambda: self.maxima[row], lambda i: load(*self.place(row, i), "f32")
