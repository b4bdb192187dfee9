"""The interface of a compiled function, as dataclasses named like their keys in the manifest. Owns what a name there
stands for in bytes; must not know where a function's code lies or who calls it.

A manifest holds these, `lowering` derives them from the IR, and both sides of a native call obey them (`abi`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from xllm_compiler.dims import Dim, as_dim, parse_dim

STEP: Final = "step"
"""The function that a chat server runs: tokens in, logits out (docs/ir.md, "The step function")."""

EMBED: Final = "embed"
"""The function that makes embeddings: the inputs of @step, its states, and hidden states out."""

HIDDEN: Final = "hidden"
"""The output of @embed, f32[S, width]: the model's last hidden states, behind the final norm, of the rows in `sel`."""

LOGITS: Final = "logits"
BLOCK_MAX: Final = "block_max"
BLOCK: Final = 64
"""Outputs that a sampler reads. `block_max` may be missing: the largest of every BLOCK columns of a row of logits.
The kernel of the projection has so many in registers when it writes them."""

KV: Final = "kv"
"""The kind of a state that holds keys and values in pages."""

ITEM_BYTES: Final = {"f32": 4, "bf16": 2, "f16": 2, "f64": 8, "i64": 8, "i32": 4, "i8": 1, "u8": 1, "bool": 1}
DTYPES: Final = tuple(ITEM_BYTES)


@dataclass(frozen=True, slots=True)
class ValueRange:
    """`lo <= every value <= hi`, of an integer input."""

    lo: int
    hi: int

    def __str__(self) -> str:
        return f"[{self.lo}, {self.hi}]"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """An input or output. `shape`: dim texts; `range`: None where any value may be there."""

    name: str
    dtype: str
    shape: tuple[str, ...]
    range: ValueRange | None = None

    def dims(self) -> tuple[Dim, ...]:
        """The shape as formulas."""
        return tuple(parse_dim(text) for text in self.shape)

    def nbytes(self) -> Dim:
        """Bytes of the whole tensor."""
        size = as_dim(ITEM_BYTES[self.dtype])
        for dim in self.dims():
            size = size * dim
        return size

    def __str__(self) -> str:
        limits = "" if self.range is None else f" in {self.range}"
        return f"{self.dtype}[{', '.join(self.shape)}]{limits}"


@dataclass(frozen=True, slots=True)
class State:
    """Memory that outlives a call: `blocks` (a dim text) blocks of `block_bytes` bytes, one behind the other.

    `kind` says what a block means and which `sizes` describe it. "kv": keys and values of `page` tokens in `heads`
    heads of `k` and `v` numbers. `layout`: the order of the bytes in a block, a name that the target's kernels know.
    """

    kind: str
    dtype: str
    layout: str
    sizes: dict[str, int]
    blocks: str
    block_bytes: int


@dataclass(frozen=True, slots=True)
class Program:
    """One native entry point of a function. It may run when every `guard`, a dim text, is >= 0: a variant is compiled
    for the narrower ranges that its guards say. `arena`: bytes that it needs beside inputs, outputs, states and
    weights."""

    symbol: str
    guard: tuple[str, ...]
    arena: str


@dataclass(frozen=True, slots=True)
class Function:
    """What one function takes and gives. `states`: names in the table of states, which it reads and writes. Of
    `programs` the first one whose guards hold is run; the last has none."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    states: tuple[str, ...]
    programs: tuple[Program, ...]

    def input(self, name: str) -> TensorSpec | None:
        """The input called so."""
        return next((spec for spec in self.inputs if spec.name == name), None)

    def output(self, name: str) -> TensorSpec | None:
        """The output called so."""
        return next((spec for spec in self.outputs if spec.name == name), None)

    def arena_bytes(self, sizes: Mapping[str, int]) -> int:
        """Of the program that needs most of it."""
        return max(parse_dim(program.arena).evaluate(sizes) for program in self.programs)

    def output_bytes(self, sizes: Mapping[str, int]) -> int:
        """Of all outputs."""
        return sum(spec.nbytes().evaluate(sizes) for spec in self.outputs)


POOLINGS: Final = ("last", "mean", "cls")
"""Which hidden states an embedding is made of: the last token's, the mean of all, or the first token's."""


@dataclass(frozen=True, slots=True)
class Pooling:
    """How a text's hidden states become its embedding. `kind`: one of POOLINGS. `normalize`: to length 1.

    `dimensions`: the sizes to which an embedding may be cut, as the checkpoint was trained for (Matryoshka): none of
    them means any size. None: it may not be cut."""

    kind: str
    normalize: bool
    dimensions: tuple[int, ...] | None


def page_tokens(states: Iterable[State]) -> int | None:
    """Tokens in a page of the KV states, which is the same for all of them; None where there are none."""
    return next((state.sizes["page"] for state in states if state.kind == KV), None)
