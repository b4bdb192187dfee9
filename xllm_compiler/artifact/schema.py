"""What a manifest says, as dataclasses named like its JSON keys. Owns the format's version and every rule that a
manifest must obey by itself; must not touch the file system (that is `io`)."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass, replace
from typing import Any

from xllm_compiler.artifact.decode import bad, decode, encode
from xllm_compiler.dims import Dim, parse_dim
from xllm_compiler.errors import XllmError

FORMAT = 3
"""Rises with every change that an older runtime would misread. There is no reading of other versions: compile again."""

MANIFEST = "manifest.json"
STEP = "step.xir"
WEIGHTS = "weights.bin"
HUGE_PAGE = 1 << 21  # bytes: the blocks in which the weight file is written, so that it can be mapped by such
CALLS = "calls.json"

_ITEM_BYTES = {"f32": 4, "bf16": 2, "f16": 2, "f64": 8, "i64": 8, "i32": 4, "i8": 1, "u8": 1, "bool": 1}
DTYPES = tuple(_ITEM_BYTES)
LAYOUTS = re.compile(r"row|panel|glu|(glu_)?(q[48](g[1-9][0-9]*)?z?|q4grid(16|32))")
SYMBOLS = ("N", "B", "S", "P")
"""Tokens, requests, sampled rows and KV pages of a step; every manifest gives their ranges."""
OUTPUTS = ("logits", "block_max")
"""What a step writes, one behind the other: f32 [S, vocabulary] and, if it finds them, the largest of every BLOCK."""
BLOCK = 64

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_DIGEST = re.compile(r"[0-9a-f]{32}\Z")


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
    """`isas`: instruction set levels with code in this artifact. `page`: tokens in a KV page."""

    kind: str
    isas: tuple[str, ...]
    page: int


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

    @staticmethod
    def from_json(text: str) -> Manifest:
        """Read and validate. Raises kind "artifact" for anything but a manifest as `to_json` writes it, so that one
        changed character is found."""
        manifest = parse_manifest(text)
        if manifest.id != manifest.computed_id():
            raise bad("$.id", "the id is not the digest of the rest")
        if text != manifest.to_json():
            raise bad("$", "not the canonical text that the compiler wrote")
        manifest.validate()
        return manifest

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
        """Parse a dim text of this manifest."""
        return _dim(text, "$", self.dims)

    def limit_values(self, pages: int) -> dict[str, int]:
        """N, B and S at their limits, with a pool of `pages`."""
        at_limits = {name: self.dims[name].hi for name in SYMBOLS if name != "P"}
        return {**at_limits, "P": pages}

    def validate(self) -> None:
        """Check every rule that binds several fields. Raises kind "artifact"."""
        _check_model(self.model)
        _check_target(self)
        _check_dims(self)
        for group, specs in (("inputs", self.inputs), ("outputs", self.outputs)):
            _unique([spec.name for spec in specs], f"$.{group}")
            for i, spec in enumerate(specs):
                where = f"$.{group}[{i}]"
                _one_of(spec.dtype, DTYPES, f"{where}.dtype")
                for text in spec.shape:
                    _dim(text, f"{where}.shape", self.dims)
        _check_outputs(self)
        _dim(self.memory.arena, "$.memory.arena", self.dims)
        _dim(self.memory.logits, "$.memory.logits", self.dims)
        _check_kv(self)
        _check_weights(self)
        _check_programs(self)
        _check_files(self)


def canonical_json(value: object) -> str:
    """The one text of a JSON value: sorted keys, indent 1, no NaN, a newline at the end."""
    return json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def parse_manifest(text: str) -> Manifest:
    """Types and version only; `Manifest.from_json` is what readers want."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise bad("$", f"not JSON: {error}") from None
    if not isinstance(value, dict) or "format" not in value:
        raise bad("$", "no format version")
    if value["format"] != FORMAT or isinstance(value["format"], bool):
        raise XllmError(
            "artifact",
            f"this artifact has format {value['format']!r}, and this version of xllm-compiler reads format {FORMAT}",
            where="manifest.json: $.format",
            help="compile the checkpoint again with this version, or serve the artifact with the version that made it",
        )
    return decode(Manifest, value)


def _one_of(value: str, allowed: tuple[str, ...], where: str) -> None:
    if value not in allowed:
        raise bad(where, f"{value!r} is none of {', '.join(allowed)}")


def _at_least(value: int, low: int, where: str) -> None:
    if value < low:
        raise bad(where, f"{value} is less than {low}")


def _unique(names: list[str], where: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise bad(where, f"{name!r} is there twice")
        seen.add(name)


def _dim(text: str, where: str, dims: dict[str, DimRange]) -> Dim:
    try:
        dim = parse_dim(text)
    except (XllmError, ValueError) as error:
        message = error.message if isinstance(error, XllmError) else str(error)
        raise bad(where, f"{text!r} is not a dim: {message}") from None
    for symbol in dim.symbols:
        if symbol not in dims:
            raise bad(where, f"{text!r} uses {symbol}, which has no range")
    return dim


def _check_outputs(manifest: Manifest) -> None:
    names = tuple(spec.name for spec in manifest.outputs)
    if not names or names != OUTPUTS[: len(names)]:
        raise bad("$.outputs", f"{', '.join(names) or 'nothing'} is not {' and '.join(OUTPUTS)}, nor the first alone")
    blocks = -(-manifest.model.vocab_size // BLOCK)
    for spec, columns in zip(manifest.outputs, (manifest.model.vocab_size, blocks), strict=False):
        if (spec.dtype, spec.shape) != ("f32", ("S", str(columns))):
            shape = ", ".join(spec.shape)
            raise bad("$.outputs", f"{spec.name} is {spec.dtype}[{shape}], and a sampler reads f32[S, {columns}]")


def _check_model(model: Model) -> None:
    for name in ("vocab_size", "hidden_size", "layers", "max_model_len"):
        _at_least(getattr(model, name), 1, f"$.model.{name}")
    _one_of(model.dtype, DTYPES, "$.model.dtype")
    tokens = list(model.eos_token_ids) + ([] if model.bos_token_id is None else [model.bos_token_id])
    for token in tokens:
        if token < 0:
            raise bad("$.model", f"token id {token} is negative")


def _check_target(manifest: Manifest) -> None:
    target = manifest.target
    for name in (target.kind, *target.isas):
        if not _NAME.match(name):
            raise bad("$.target", f"{name!r} is not a name")
    _unique(list(target.isas), "$.target.isas")
    _at_least(target.page, 1, "$.target.page")
    if not target.isas:
        raise bad("$.target.isas", "no instruction set")


def _check_dims(manifest: Manifest) -> None:
    for name, dim_range in manifest.dims.items():
        if not _NAME.match(name):
            raise bad("$.dims", f"{name!r} is not a symbol")
        if dim_range.lo > dim_range.hi:
            raise bad(f"$.dims.{name}", f"the range {dim_range.lo} to {dim_range.hi} is empty")
    for name in SYMBOLS:
        if name not in manifest.dims:
            raise bad("$.dims", f"{name} has no range")
    limits = manifest.limits
    for name, limit in (("N", limits.max_num_batched_tokens), ("B", limits.max_num_seqs), ("S", limits.max_num_logits)):
        if manifest.dims[name].hi != limit:
            raise bad(f"$.dims.{name}.hi", f"{manifest.dims[name].hi} differs from the limit {limit}")
    _at_least(limits.max_num_seqs, 1, "$.limits.max_num_seqs")
    _at_least(limits.max_num_logits, 1, "$.limits.max_num_logits")
    _at_least(limits.max_num_batched_tokens, limits.max_num_seqs, "$.limits.max_num_batched_tokens")


def _check_kv(manifest: Manifest) -> None:
    kv = manifest.memory.kv
    if kv.page_tokens != manifest.target.page:
        raise bad("$.memory.kv.page_tokens", f"{kv.page_tokens} differs from the target's page {manifest.target.page}")
    for i, layer in enumerate(kv.layers):
        for name in ("page_bytes", "heads", "k", "v"):
            _at_least(getattr(layer, name), 1, f"$.memory.kv.layers[{i}].{name}")


def _check_weights(manifest: Manifest) -> None:
    weights = manifest.weights
    _unique([tensor.name for tensor in weights.tensors], "$.weights.tensors")
    end, last = 0, ""
    for tensor in sorted(weights.tensors, key=lambda tensor: tensor.offset):
        where = f"$.weights.tensors: {tensor.name}"
        _one_of(tensor.dtype, DTYPES, where)
        if not LAYOUTS.fullmatch(tensor.layout):
            raise bad(where, f"layout {tensor.layout!r} is not known")
        for size in tensor.shape:
            _at_least(size, 0, where)
        if tensor.bytes != math.prod(tensor.shape) * _ITEM_BYTES[tensor.dtype]:
            raise bad(where, f"{tensor.bytes} bytes do not hold {tensor.dtype}{list(tensor.shape)}")
        if tensor.offset < end:
            raise bad(where, f"starts at {tensor.offset}, inside {last or 'nothing: the offset is negative'}")
        end, last = tensor.offset + tensor.bytes, tensor.name
    if end > weights.bytes:
        raise bad("$.weights.bytes", f"{last} ends at {end}, and the table says {weights.bytes}")
    if WEIGHTS in manifest.files and manifest.files[WEIGHTS].bytes != weights.bytes:
        raise bad(f"$.files.{WEIGHTS}", f"{manifest.files[WEIGHTS].bytes} bytes, and the table says {weights.bytes}")


def _check_programs(manifest: Manifest) -> None:
    programs = manifest.programs
    if not programs:
        raise bad("$.programs", "none")
    _unique([program.name for program in programs], "$.programs")
    for i, program in enumerate(programs):
        where = f"$.programs[{i}]"
        if not _NAME.match(program.symbol) or not _NAME.match(program.name):
            raise bad(where, f"{program.name!r} or {program.symbol!r} is not a name")
        for text in program.guard:
            _dim(text, f"{where}.guard", manifest.dims)
    if programs[-1].guard:
        raise bad("$.programs", "the last program must have no guard, or some step could run nowhere")


def _check_files(manifest: Manifest) -> None:
    needed = [STEP, WEIGHTS, CALLS, *(f"{manifest.target.kind}/{isa}.so" for isa in manifest.target.isas)]
    for name in needed:
        if name not in manifest.files:
            raise bad("$.files", f"{name} is not listed")
    for name, entry in manifest.files.items():
        parts = name.split("/")
        if name == MANIFEST or "\\" in name or "\0" in name or any(part in ("", ".", "..") for part in parts):
            raise bad("$.files", f"{name!r} is not the name of a file inside the artifact")
        _at_least(entry.bytes, 0, f"$.files.{name}.bytes")
        if not _DIGEST.match(entry.xxh3_128):
            raise bad(f"$.files.{name}.xxh3_128", f"{entry.xxh3_128!r} is not a digest")
