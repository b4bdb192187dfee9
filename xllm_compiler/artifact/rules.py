"""What a manifest must obey: strict reading, and every rule that binds its fields to each other. What can be known to
contradict itself is refused here; must not touch the file system (that is `io`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Final

from xllm_compiler.artifact.decode import bad, decode, shown
from xllm_compiler.artifact.schema import (
    FORMAT,
    MANIFEST,
    MODULE,
    PAGES,
    SYMBOLS,
    WEIGHTS,
    Manifest,
    Model,
    Weight,
)
from xllm_compiler.artifact.strict_json import parse_json
from xllm_compiler.dims import Dim, parse_dim
from xllm_compiler.errors import XllmError
from xllm_compiler.step.abi import SYMBOL_PREFIX
from xllm_compiler.step.interface import DTYPES, EMBED, HIDDEN, ITEM_BYTES, KV, POOLINGS, Function, TensorSpec
from xllm_compiler.weight_formats import Layout

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,200}\Z")
_STATE = re.compile(r"[A-Za-z_][A-Za-z0-9_.]{0,200}\Z")
_DIGEST = re.compile(r"[0-9a-f]{32}\Z")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_INT32: Final = 2**31 - 1  # sizes, positions and tokens are 32-bit integers in a step
_MOST_BYTES: Final = 1 << 50
_ALIGN: Final = 64  # of every tensor in the weight file, for the widest registers
_COMPUTED: Final = ("f32", "bf16")  # what linear layers may compute in
_CACHED: Final = ("f32", "bf16", "i8")  # what keys and values may be stored as
_KV_SIZES: Final = ("heads", "k", "v", "page")
_COUNTED: Final = ("i8", "u8", "i32", "i64")


def read_text(data: bytes) -> Manifest:
    """The manifest in a file's bytes. Raises kind "artifact" for anything but a valid one as `to_json` writes it, so
    that one changed character is found."""
    value = parse_json(data, MANIFEST)
    if not isinstance(value, dict) or "format" not in value:
        raise bad("$", "no format version")
    if value["format"] != FORMAT or isinstance(value["format"], bool):
        raise XllmError(
            "artifact",
            f"this artifact has format {shown(value['format'])}, and this version of xllm-compiler reads format "
            f"{FORMAT}",
            where="manifest.json: $.format",
            help="compile the checkpoint again with this version, or serve the artifact with the version that made it",
        )
    manifest = decode(Manifest, value)
    if manifest.id != manifest.computed_id():
        raise bad("$.id", "the id is not the digest of the rest")
    if data != manifest.to_json().encode():
        raise bad("$", "not the canonical text that the compiler wrote")
    validate(manifest)
    return manifest


def validate(manifest: Manifest) -> None:
    """Check every rule. Raises kind "artifact"."""
    _check_model(manifest.model)
    _check_target(manifest)
    _check_dims(manifest)
    _check_states(manifest)
    _check_functions(manifest)
    _check_pooling(manifest)
    _check_weights(manifest)
    _check_files(manifest)


def _one_of(value: str, allowed: tuple[str, ...], where: str) -> None:
    if value not in allowed:
        raise bad(where, f"{shown(value)} is none of {', '.join(allowed)}")


def _within(value: int, low: int, high: int, where: str) -> None:
    if value < low:
        raise bad(where, f"{value} is less than {low}")
    if value > high:
        raise bad(where, f"{value} is more than {high}")


def _unique(names: Iterable[str], where: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise bad(where, f"{shown(name)} is there twice")
        seen.add(name)


def _plain(text: str, where: str) -> None:
    """Names are printed: they must not steer a terminal."""
    if _CONTROL.search(text):
        raise bad(where, f"{shown(text)} holds a control character")


def _dim(text: str, where: str, symbols: Iterable[str]) -> Dim:
    """A formula of the symbols that has a value wherever they have one."""
    try:
        dim = parse_dim(text)
    except (XllmError, ValueError) as error:
        message = error.message if isinstance(error, XllmError) else str(error)
        raise bad(where, f"{shown(text)} is not a dim: {message}") from None
    for symbol in dim.symbols:
        if symbol not in symbols:
            raise bad(where, f"{shown(text)} uses {symbol}, which has no range")
    if not _divides_by_numbers(dim):
        raise bad(where, f"{shown(text)} divides by what may be zero")
    return dim


def _divides_by_numbers(dim: Dim) -> bool:
    atoms = [atom for mono, _ in dim.terms for atom in mono if atom.kind != "sym"]
    return all(
        (atom.kind in ("min", "max") or atom.args[1].is_const) and all(map(_divides_by_numbers, atom.args))
        for atom in atoms
    )


def _check_model(model: Model) -> None:
    for name in ("vocab_size", "hidden_size", "layers", "max_model_len"):
        _within(getattr(model, name), 1, _INT32, f"$.model.{name}")
    _one_of(model.dtype, _COMPUTED, "$.model.dtype")
    for name in ("architecture", "name"):
        _plain(getattr(model, name), f"$.model.{name}")
    tokens = list(model.eos_token_ids) + ([] if model.bos_token_id is None else [model.bos_token_id])
    for token in tokens:
        if token < 0:
            raise bad("$.model", f"token id {token} is negative")
        _within(token, 0, _INT32, "$.model: token id")


def _check_target(manifest: Manifest) -> None:
    target = manifest.target
    for name in (target.kind, *target.levels):
        if not _NAME.match(name):
            raise bad("$.target", f"{shown(name)} is not a name")
    _unique(target.levels, "$.target.levels")
    _unique(target.files, "$.target.files")
    if not target.levels:
        raise bad("$.target.levels", "no code for any machine")


def _check_dims(manifest: Manifest) -> None:
    limits = manifest.limits
    _within(limits.max_num_seqs, 1, _INT32, "$.limits.max_num_seqs")
    _within(limits.max_num_logits, 1, _INT32, "$.limits.max_num_logits")
    _within(limits.max_num_batched_tokens, limits.max_num_seqs, _INT32, "$.limits.max_num_batched_tokens")
    for name, dim_range in manifest.dims.items():
        where = f"$.dims.{name[:80]}"
        if not _NAME.match(name):
            raise bad("$.dims", f"{shown(name)} is not a symbol")
        if dim_range.lo > dim_range.hi:
            raise bad(where, f"the range {dim_range.lo} to {dim_range.hi} is empty")
        _within(dim_range.lo, 0 if name == "S" else 1, _INT32, f"{where}.lo")
        _within(dim_range.hi, 1, _INT32, f"{where}.hi")
        _plain(dim_range.why, f"{where}.why")
    for name in SYMBOLS:
        if name not in manifest.dims:
            raise bad("$.dims", f"{name} has no range")
    for name, limit in (("N", limits.max_num_batched_tokens), ("B", limits.max_num_seqs), ("S", limits.max_num_logits)):
        if manifest.dims[name].hi != limit:
            raise bad(f"$.dims.{name}.hi", f"{manifest.dims[name].hi} differs from the limit {limit}")


def kv_page_bytes(dtype: str, heads: int, k: int, v: int, page: int) -> int:
    """Bytes of a KV page: numbers of f32 or bf16; of i8 with keys in whole quads, two scales and a sum per token."""
    if dtype == "i8":
        return heads * page * (-(-k // 4) * 4 + v + 3 * ITEM_BYTES["f32"])
    return heads * page * (k + v) * ITEM_BYTES[dtype]


def _check_states(manifest: Manifest) -> None:
    for name, state in manifest.states.items():
        where = f"$.states.{name[:80]}"
        if not _STATE.match(name):
            raise bad("$.states", f"{shown(name)} is not a name")
        _one_of(state.kind, (KV,), f"{where}.kind")
        _one_of(state.dtype, _CACHED, f"{where}.dtype")
        if not _NAME.match(state.layout):
            raise bad(f"{where}.layout", f"{shown(state.layout)} is not a name")
        if set(state.sizes) != set(_KV_SIZES):
            raise bad(f"{where}.sizes", f"they are {shown(sorted(state.sizes))}, not {', '.join(_KV_SIZES)}")
        for size, value in state.sizes.items():
            _within(value, 1, _INT32, f"{where}.sizes.{size}")
        if state.blocks != PAGES:
            raise bad(f"{where}.blocks", f"{shown(state.blocks)} is not the number of KV pages, {PAGES}")
        wanted = kv_page_bytes(state.dtype, *(state.sizes[size] for size in _KV_SIZES))
        if state.block_bytes != wanted:
            raise bad(f"{where}.block_bytes", f"{state.block_bytes}, and such a page has {wanted} bytes")
    pages = {state.sizes["page"] for state in manifest.states.values()}
    if len(pages) > 1:
        raise bad("$.states", f"pages of {' and '.join(map(str, sorted(pages)))} tokens share one table")


def _check_functions(manifest: Manifest) -> None:
    if not manifest.functions:
        raise bad("$.functions", "none")
    symbols: list[str] = []
    for name, function in manifest.functions.items():
        where = f"$.functions.{name[:80]}"
        if not _NAME.match(name):
            raise bad("$.functions", f"{shown(name)} is not a name")
        _check_specs(function.inputs, f"{where}.inputs", manifest)
        _check_specs(function.outputs, f"{where}.outputs", manifest)
        _unique(function.states, f"{where}.states")
        for state in function.states:
            if state not in manifest.states:
                raise bad(f"{where}.states", f"{shown(state)} is in no table of states")
        _check_programs(function, f"{where}.programs", manifest)
        symbols += [program.symbol for program in function.programs]
    _unique(symbols, "$.functions: programs")
    used = {state for function in manifest.functions.values() for state in function.states}
    for state in manifest.states:
        if state not in used:
            raise bad(f"$.states.{state[:80]}", "no function uses it")


def _check_pooling(manifest: Manifest) -> None:
    """Who makes embeddings says of what, and nobody else does."""
    pooling, embed = manifest.model.pooling, manifest.functions.get(EMBED)
    if (pooling is None) != (embed is None):
        raise bad("$.model.pooling", f"@{EMBED} and how its rows are pooled are there together, or neither is")
    if pooling is None or embed is None:
        return
    _one_of(pooling.kind, POOLINGS, "$.model.pooling.kind")
    spec = embed.output(HIDDEN)
    if spec is None or len(spec.shape) != 2 or not spec.dims()[1].is_const:
        raise bad(f"$.functions.{EMBED}.outputs", f"{HIDDEN} is {spec or 'missing'}, not rows of a fixed width")
    for size in pooling.dimensions or ():
        _within(size, 1, spec.dims()[1].value, "$.model.pooling.dimensions")


def _check_specs(specs: tuple[TensorSpec, ...], where: str, manifest: Manifest) -> None:
    _unique((spec.name for spec in specs), where)
    for i, spec in enumerate(specs):
        at = f"{where}[{i}]"
        if not _NAME.match(spec.name):
            raise bad(at, f"{shown(spec.name)} is not a name")
        _one_of(spec.dtype, DTYPES, f"{at}.dtype")
        for text in spec.shape:
            _dim(text, f"{at}.shape", manifest.dims)
        if spec.range is not None:
            if spec.dtype not in _COUNTED:
                raise bad(f"{at}.range", f"{spec.dtype} has no range")
            if spec.range.lo > spec.range.hi:
                raise bad(f"{at}.range", f"the range {spec.range.lo} to {spec.range.hi} is empty")
        _check_bytes(spec.nbytes(), at, manifest)


def _check_programs(function: Function, where: str, manifest: Manifest) -> None:
    if not function.programs:
        raise bad(where, "none")
    for i, program in enumerate(function.programs):
        at = f"{where}[{i}]"
        if not _NAME.match(program.symbol) or not program.symbol.startswith(SYMBOL_PREFIX):
            raise bad(at, f"{shown(program.symbol)} is no program: their names begin with {SYMBOL_PREFIX}")
        for text in program.guard:
            _dim(text, f"{at}.guard", manifest.dims)
        _check_bytes(_dim(program.arena, f"{at}.arena", manifest.dims), f"{at}.arena", manifest)
    if function.programs[-1].guard:
        raise bad(where, "the last program must have no guard, or some step could run nowhere")


def _check_bytes(size: Dim, where: str, manifest: Manifest) -> None:
    """A size in bytes must be possible wherever its symbols may be."""
    least = {name: limits.lo for name, limits in manifest.dims.items()}
    for sizes in (least, manifest.limit_values(1), manifest.limit_values(manifest.dims[PAGES].hi)):
        _within(size.evaluate(sizes), 0, _MOST_BYTES, where)


def _check_weights(manifest: Manifest) -> None:
    weights = manifest.weights
    _within(weights.bytes, 0, _MOST_BYTES, "$.weights.bytes")
    _unique((tensor.name for tensor in weights.tensors), "$.weights.tensors")
    end, last = 0, ""
    for tensor in sorted(weights.tensors, key=lambda tensor: tensor.offset):
        where = f"$.weights.tensors: {tensor.name[:200]}"
        _check_weight(tensor, where)
        if tensor.offset < end:
            raise bad(where, f"starts at {tensor.offset}, inside {last or 'nothing: the offset is negative'}")
        if tensor.offset % _ALIGN:
            raise bad(where, f"starts at {tensor.offset}, which is no multiple of {_ALIGN}")
        end, last = tensor.offset + tensor.bytes, tensor.name
    if end > weights.bytes:
        raise bad("$.weights.bytes", f"{last} ends at {end}, and the table says {weights.bytes}")
    if WEIGHTS in manifest.files and manifest.files[WEIGHTS].bytes != weights.bytes:
        raise bad(f"$.files.{WEIGHTS}", f"{manifest.files[WEIGHTS].bytes} bytes, and the table says {weights.bytes}")


def _check_weight(tensor: Weight, where: str) -> None:
    _plain(tensor.name, where)
    _one_of(tensor.dtype, DTYPES, where)
    try:
        layout = Layout.parse(tensor.layout)
    except XllmError:
        raise bad(where, f"layout {shown(tensor.layout)} is not known") from None
    for size in tensor.shape:
        _within(size, 0, _MOST_BYTES, where)
    if tensor.bytes != math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype]:
        raise bad(where, f"{tensor.bytes} bytes do not hold {tensor.dtype}{shown(list(tensor.shape))}")
    if not layout.holds(tensor.shape, tensor.dtype):
        raise bad(where, f"{tensor.dtype}{shown(list(tensor.shape))} is no packed array of layout {tensor.layout}")


def _check_files(manifest: Manifest) -> None:
    for name in (MODULE, WEIGHTS, *manifest.target.files):
        if name not in manifest.files:
            raise bad("$.files", f"{name} is not listed")
    for name, entry in manifest.files.items():
        where = f"$.files.{name[:200]}"
        parts = name.split("/")
        if name == MANIFEST or "\\" in name or any(part in ("", ".", "..") for part in parts):
            raise bad("$.files", f"{shown(name)} is not the name of a file inside the artifact")
        if any(len(part.encode()) > 255 for part in parts) or len(name) > 1024:
            raise bad("$.files", f"{shown(name)} is too long for the name of a file")
        _plain(name, "$.files")
        _within(entry.bytes, 0, _MOST_BYTES, f"{where}.bytes")
        if not _DIGEST.match(entry.xxh3_128):
            raise bad(f"{where}.xxh3_128", f"{shown(entry.xxh3_128)} is not a digest")
