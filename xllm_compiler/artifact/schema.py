"""What a manifest says, as dataclasses named like its JSON keys, and the names that the format knows. What a manifest
must obey is `rules`, the file system is `io`."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, replace
from typing import Any

from xllm_compiler.artifact.decode import encode
from xllm_compiler.dims import Dim, parse_dim

FORMAT = 5
"""Rises with every change that an older runtime would misread. There is no reading of other versions: compile again."""

MANIFEST = "manifest.json"
STEP = "step.xir"
WEIGHTS = "weights.bin"
HUGE_PAGE = 1 << 21  # bytes: the blocks in which the weight file is written, so that it can be mapped by such
CALLS = "calls.json"

ITEM_BYTES = {"f32": 4, "bf16": 2, "f16": 2, "f64": 8, "i64": 8, "i32": 4, "i8": 1, "u8": 1, "bool": 1}
DTYPES = tuple(ITEM_BYTES)
LAYOUTS = re.compile(r"row|panel|glu|(glu_)?(q[48](g[1-9][0-9]*)?z?|q4grid(16|32))")
SYMBOLS = ("N", "B", "S", "P")
"""Tokens, requests, sampled rows and KV pages of a step; every manifest gives their ranges."""
OUTPUTS = ("logits", "block_max")
"""What a step writes, one behind the other: f32 [S, vocabulary] and, if it finds them, the largest of every BLOCK."""
BLOCK = 64


@dataclass(frozen=True, slots=True)
class Model:
    """The checkpoint's own facts. `dtype` is the one that linear layers compute in."""

    architecture: str
    name: str
    vocab_size: int
    hidden_size: int
    layers: int
    dtype: str
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None


@dataclass(frozen=True, slots=True)
class Target:
    """`kind`: who can run this artifact. `page`: tokens in a KV page. `levels`: the machines that there is code for,
    from the widest spread to the best, and `files`: those that only this kind reads; what both mean is the kind's."""

    kind: str
    page: int
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
class TensorSpec:
    """An input or output of the step; `shape` holds dim texts."""

    name: str
    dtype: str
    shape: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class KvLayer:
    """One layer's page: `heads` KV heads with `k` and `v` numbers per token each, `page_bytes` in all."""

    page_bytes: int
    heads: int
    k: int
    v: int


@dataclass(frozen=True, slots=True)
class KvPlan:
    """The KV pool. Layer l starts at byte `P * sum(page_bytes of the layers before)`."""

    page_tokens: int
    layers: tuple[KvLayer, ...]

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all layers."""
        return sum(layer.page_bytes for layer in self.layers)


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that a step needs, as dim texts over N, B, S and P."""

    arena: str
    logits: str
    kv: KvPlan


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
class Program:
    """One native entry point. It may run a step when every `guard` dim is >= 0."""

    name: str
    guard: tuple[str, ...]
    symbol: str


@dataclass(frozen=True, slots=True)
class FileEntry:
    """Size and digest (`artifact.digest`) of one file."""

    bytes: int
    xxh3_128: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """The whole manifest. Files are named relative to it; nothing in it depends on where or when it was made."""

    format: int
    id: str
    model: Model
    target: Target
    limits: Limits
    dims: dict[str, DimRange]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    memory: Memory
    weights: Weights
    programs: tuple[Program, ...]
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

    def dim(self, text: str) -> Dim:
        """Parse a dim text of this manifest, which was checked when it was read."""
        return parse_dim(text)

    def limit_values(self, pages: int) -> dict[str, int]:
        """N, B and S at their limits, with a pool of `pages`."""
        at_limits = {name: self.dims[name].hi for name in SYMBOLS if name != "P"}
        return {**at_limits, "P": pages}


def canonical_json(value: object) -> str:
    """The one text of a JSON value: sorted keys, indent 1, no NaN, a newline at the end."""
    return json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
