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
    BLOCK,
    DTYPES,
    FORMAT,
    ITEM_BYTES,
    LAYOUTS,
    MANIFEST,
    OUTPUTS,
    STEP,
    SYMBOLS,
    WEIGHTS,
    Manifest,
    Model,
    Weight,
)
from xllm_compiler.artifact.strict_json import parse_json
from xllm_compiler.dims import Dim, parse_dim, sym
from xllm_compiler.errors import XllmError

STEP_SYMBOL: Final = "xllm_step_"
"""What the name of every program's function begins with."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,200}\Z")
_DIGEST = re.compile(r"[0-9a-f]{32}\Z")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_INT32: Final = 2**31 - 1  # sizes, positions and tokens are 32-bit integers in a step
_MOST_BYTES: Final = 1 << 50
_ALIGN: Final = 64  # of every tensor in the weight file, for the widest registers
_COMPUTED: Final = ("f32", "bf16")  # what linear layers may compute in
_PANEL: Final = 64  # rows that lie together


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
    _check_specs(manifest)
    _check_outputs(manifest)
    _check_kv(manifest)
    _check_memory(manifest)
    _check_weights(manifest)
    _check_programs(manifest)
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
    _within(target.page, 1, _INT32, "$.target.page")
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


def _check_specs(manifest: Manifest) -> None:
    for group, specs in (("inputs", manifest.inputs), ("outputs", manifest.outputs)):
        _unique((spec.name for spec in specs), f"$.{group}")
        for i, spec in enumerate(specs):
            where = f"$.{group}[{i}]"
            _one_of(spec.dtype, DTYPES, f"{where}.dtype")
            for text in spec.shape:
                _dim(text, f"{where}.shape", manifest.dims)
    width = str(-(-manifest.model.max_model_len // manifest.target.page))
    known = {
        "ids": ("N",),
        "pos": ("N",),
        "seq": ("N",),
        "start": ("B + 1",),
        "table": ("B", width),
        "sel": ("S",),
    }
    for i, spec in enumerate(manifest.inputs):
        if spec.name not in known:
            raise bad(f"$.inputs[{i}]", f"{shown(spec.name)} is none of {', '.join(known)}")
        if (spec.dtype, spec.shape) != ("i32", known[spec.name]):
            given = f"{spec.dtype}[{', '.join(spec.shape)}]"
            raise bad(
                f"$.inputs[{i}]", f"{spec.name} is {shown(given)}, and a step is given i32{list(known[spec.name])}"
            )


def _check_outputs(manifest: Manifest) -> None:
    names = tuple(spec.name for spec in manifest.outputs)
    if not names or names != OUTPUTS[: len(names)]:
        given = ", ".join(names) or "nothing"
        raise bad("$.outputs", f"{shown(given)} is not {' and '.join(OUTPUTS)}, nor the first alone")
    blocks = -(-manifest.model.vocab_size // BLOCK)
    for spec, columns in zip(manifest.outputs, (manifest.model.vocab_size, blocks), strict=False):
        if (spec.dtype, spec.shape) != ("f32", ("S", str(columns))):
            given = f"{spec.dtype}[{', '.join(spec.shape)}]"
            raise bad("$.outputs", f"{spec.name} is {shown(given)}, and a sampler reads f32[S, {columns}]")


def kv_page_bytes(dtype: str, heads: int, k: int, v: int, page: int) -> int:
    """Bytes of a KV page: numbers of f32 or bf16; of i8 with keys in whole quads, two scales and a sum per token."""
    if dtype == "i8":
        return heads * page * (-(-k // 4) * 4 + v + 3 * ITEM_BYTES["f32"])
    return heads * page * (k + v) * ITEM_BYTES[dtype]


def _check_kv(manifest: Manifest) -> None:
    kv = manifest.memory.kv
    if kv.page_tokens != manifest.target.page:
        raise bad("$.memory.kv.page_tokens", f"{kv.page_tokens} differs from the target's page {manifest.target.page}")
    for i, layer in enumerate(kv.layers):
        where = f"$.memory.kv.layers[{i}]"
        for name in ("page_bytes", "heads", "k", "v"):
            _within(getattr(layer, name), 1, _INT32, f"{where}.{name}")
        fitting = [
            kv_page_bytes(dtype, layer.heads, layer.k, layer.v, kv.page_tokens) for dtype in ("f32", "bf16", "i8")
        ]
        if layer.page_bytes not in fitting:
            sizes = ", ".join(map(str, fitting))
            raise bad(
                f"{where}.page_bytes",
                f"{layer.page_bytes} bytes are no page of {kv.page_tokens} tokens with {layer.heads} heads of "
                f"{layer.k} and {layer.v} numbers: {sizes}",
            )


def _check_memory(manifest: Manifest) -> None:
    arena = _dim(manifest.memory.arena, "$.memory.arena", SYMBOLS)
    logits = _dim(manifest.memory.logits, "$.memory.logits", SYMBOLS)
    columns = sum(int(spec.shape[1]) for spec in manifest.outputs)
    if logits is not sym("S") * (columns * ITEM_BYTES["f32"]):
        given = shown(manifest.memory.logits)
        raise bad("$.memory.logits", f"{given} bytes do not hold S rows of {columns} numbers of f32")
    least = {name: manifest.dims[name].lo for name in SYMBOLS}
    for sizes in (least, manifest.limit_values(1), manifest.limit_values(manifest.dims["P"].hi)):
        _within(arena.evaluate(sizes), 0, _MOST_BYTES, "$.memory.arena")
        _within(logits.evaluate(sizes), 0, _MOST_BYTES, "$.memory.logits")


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
    if not LAYOUTS.fullmatch(tensor.layout):
        raise bad(where, f"layout {shown(tensor.layout)} is not known")
    for size in tensor.shape:
        _within(size, 0, _MOST_BYTES, where)
    if tensor.bytes != math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype]:
        raise bad(where, f"{tensor.bytes} bytes do not hold {tensor.dtype}{shown(list(tensor.shape))}")
    if tensor.layout == "row":
        return
    packed = tensor.layout in ("panel", "glu")
    ends = {"f32": (_PANEL,), "bf16": (_PANEL, 2)}.get(tensor.dtype) if packed else ()
    wanted = None if ends is None else (3 if tensor.dtype == "f32" else 4) if packed else 2
    fits = len(tensor.shape) == wanted and (not ends or tensor.shape[-len(ends) :] == ends)
    if not fits or (not packed and tensor.dtype != "u8"):
        raise bad(where, f"{tensor.dtype}{shown(list(tensor.shape))} is no packed array of layout {tensor.layout}")


def _check_programs(manifest: Manifest) -> None:
    programs = manifest.programs
    if not programs:
        raise bad("$.programs", "none")
    _unique((program.name for program in programs), "$.programs")
    for i, program in enumerate(programs):
        where = f"$.programs[{i}]"
        if not _NAME.match(program.symbol) or not _NAME.match(program.name):
            raise bad(where, f"{shown(program.name)} or {shown(program.symbol)} is not a name")
        if not program.symbol.startswith(STEP_SYMBOL):
            raise bad(where, f"{program.symbol} is no function of a step: those begin with {STEP_SYMBOL}")
        for text in program.guard:
            _dim(text, f"{where}.guard", SYMBOLS)
    if programs[-1].guard:
        raise bad("$.programs", "the last program must have no guard, or some step could run nowhere")


def _check_files(manifest: Manifest) -> None:
    for name in (STEP, WEIGHTS, *manifest.target.files):
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
