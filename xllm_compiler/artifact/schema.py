"""What a manifest says, as dataclasses named like its JSON keys, and the names that the format knows; those of
functions and states are `step.interface`'s. What a manifest must obey is `rules`, the file system is `io`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from xllm_compiler.artifact.decode import encode
from xllm_compiler.step.interface import KV, Function, Pooling, State, page_tokens

FORMAT = 6
"""Rises with every change that an older runtime would misread. There is no reading of other versions: compile again."""

MANIFEST = "manifest.json"
MODULE = "module.xir"
WEIGHTS = "weights.bin"
HUGE_PAGE = 1 << 21  # bytes: the blocks in which the weight file is written, so that it can be mapped by such
CALLS = "calls.json"

PAGES = "P"
SYMBOLS = ("N", "B", "S", PAGES)
"""Tokens, requests, sampled rows and KV pages of a step; every manifest gives their ranges, and may give others."""


@dataclass(frozen=True, slots=True)
class Model:
    """The checkpoint's own facts. `dtype` is the one that linear layers compute in. `pooling`: where there is an
    @embed."""

    architecture: str
    name: str
    vocab_size: int
    hidden_size: int
    layers: int
    dtype: str
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    pooling: Pooling | None


@dataclass(frozen=True, slots=True)
class Target:
    """`kind`: who can run this artifact. `levels`: the machines that there is code for, from the widest spread to the
    best, and `files`: those that only this kind reads; what both mean is the kind's."""

    kind: str
    levels: tuple[str, ...]
    files: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Limits:
    """The largest step that the programs are compiled for; equal to the upper ends of B, N and S."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_num_logits: int


@dataclass(frozen=True, slots=True)
class DimRange:
    """`lo <= symbol <= hi`, and why."""

    lo: int
    hi: int
    why: str


@dataclass(frozen=True, slots=True)
class Weight:
    """One packed tensor: `bytes` bytes at `offset` of weights.bin. `shape` is that of the packed array."""

    name: str
    layout: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Weights:
    """The table of weights.bin."""

    bytes: int
    tensors: tuple[Weight, ...]


@dataclass(frozen=True, slots=True)
class FileEntry:
    """Size and digest (`artifact.digest`) of one file."""

    bytes: int
    xxh3_128: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """The whole manifest. Files are named relative to it; nothing in it depends on where or when it was made.

    `dims`: the symbols of all functions' sizes. `states`: memory that outlives a call, by name; a function names those
    that it uses, so that several may share one.
    """

    format: int
    id: str
    model: Model
    target: Target
    limits: Limits
    dims: dict[str, DimRange]
    states: dict[str, State]
    functions: dict[str, Function]
    weights: Weights
    files: dict[str, FileEntry]
    key: dict[str, Any]

    def to_json(self) -> str:
        """Canonical text: sorted keys, indent 1, UTF-8 as it is, one newline at the end."""
        return canonical_json(encode(self))

    def computed_id(self) -> str:
        """sha256 of the canonical text without `id`."""
        value = encode(self)
        del value["id"]
        return hashlib.sha256(canonical_json(value).encode()).hexdigest()

    def with_id(self) -> Manifest:
        """The same manifest, sealed."""
        return replace(self, id=self.computed_id())

    def limit_values(self, pages: int) -> dict[str, int]:
        """Every size at its limit, with a pool of `pages` KV pages."""
        return {name: limits.hi for name, limits in self.dims.items()} | {PAGES: pages}

    def arena_bytes(self, sizes: Mapping[str, int]) -> int:
        """Of the one arena that all programs use: the largest of theirs."""
        return max(function.arena_bytes(sizes) for function in self.functions.values())

    def output_bytes(self, sizes: Mapping[str, int]) -> int:
        """Of all functions' outputs."""
        return sum(function.output_bytes(sizes) for function in self.functions.values())

    @property
    def page_tokens(self) -> int:
        """Tokens in a KV page. Where there is no KV state one page, of no bytes, is enough for any request."""
        return page_tokens(self.states.values()) or self.model.max_model_len

    @property
    def page_bytes(self) -> int:
        """Bytes of one KV page over all KV states."""
        return sum(state.block_bytes for state in self.states.values() if state.kind == KV)


def canonical_json(value: object) -> str:
    """The one text of a JSON value: sorted keys, indent 1, no NaN, a newline at the end."""
    return json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
