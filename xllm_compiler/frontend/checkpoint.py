"""Reading a Hugging Face checkpoint directory: its JSON files and the tensors of its safetensors shards.

Owns the checks that a directory is what it says it is. Every failure is an `XllmError("checkpoint")` that names the
file and the tensor. It must not know any model, and it never holds more than one tensor: headers are parsed once and
tensor bytes are read when asked for, with plain reads, so that the file's pages do not count as this process's memory.

File format: https://github.com/huggingface/safetensors#format (8 bytes little-endian header length, a JSON header with
`dtype`, `shape` and `data_offsets` per tensor, then the bytes).
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from xllm_compiler.errors import XllmError

Array = np.ndarray[Any, np.dtype[Any]]

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# safetensors dtype -> (numpy dtype, our dtype). 8-bit floats belong to quantized checkpoints and have no dtype of ours.
_DTYPES: dict[str, tuple[np.dtype[Any], str]] = {
    "F64": (np.dtype("<f8"), "f64"),
    "F32": (np.dtype("<f4"), "f32"),
    "F16": (np.dtype("<f2"), "f16"),
    "BF16": (np.dtype(ml_dtypes.bfloat16), "bf16"),
    "I64": (np.dtype("<i8"), "i64"),
    "I32": (np.dtype("<i4"), "i32"),
    "I8": (np.dtype("i1"), "i8"),
    "U8": (np.dtype("u1"), "u8"),
    "BOOL": (np.dtype("?"), "bool"),
    "F8_E4M3": (np.dtype(ml_dtypes.float8_e4m3fn), ""),
    "F8_E5M2": (np.dtype(ml_dtypes.float8_e5m2), ""),
    "F8_E8M0": (np.dtype(ml_dtypes.float8_e8m0fnu), ""),
}
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_OTHER_DTYPES = frozenset({"I16", "U16", "U32", "U64", "F4", "F6_E2M3", "F6_E3M2", "C64", "F8_E4M3FNUZ"})


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: `start` is an absolute byte offset in `file`."""

    name: str
    dtype: str  # the safetensors dtype, such as "BF16"
    shape: tuple[int, ...]
    file: Path
    start: int
    nbytes: int

    @property
    def is_float(self) -> bool:
        return self.dtype in _FLOATS


def _error(message: str, where: Path | str, help: str = "") -> XllmError:
    return XllmError("checkpoint", message, where=str(where), help=help)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in pairs:
        if key in out:
            raise ValueError(f"the key {key!r} stands there twice")
        out[key] = value
    return out


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; an XllmError("checkpoint") when it is missing, unreadable or not an object."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise _error(
            f"{path.name} is missing", path, "a checkpoint directory has config.json and *.safetensors"
        ) from None
    except UnicodeDecodeError as e:
        raise _error(f"{path.name} is not UTF-8 text: {e.reason} at byte {e.start}", path) from None
    except OSError as e:
        raise XllmError("io", f"cannot read {path.name}: {e.strerror}", where=str(path)) from None
    try:
        value = json.loads(text, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as e:
        raise _error(f"{path.name} is not valid JSON: {e}", path) from None
    if not isinstance(value, dict):
        raise _error(f"{path.name} holds a JSON {type(value).__name__}, not an object", path)
    return value


def _int(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file by name, checked against the file's size.

    Raises XllmError("checkpoint") when the file is missing, truncated, has overlapping or missing ranges, a dtype
    nobody knows, or a shape whose size is not that of its range.
    """
    try:
        with path.open("rb") as f:
            size = os.fstat(f.fileno()).st_size
            head = f.read(8)
            if len(head) < 8:
                raise _error(f"{path.name} is truncated: {size} bytes, too short for a safetensors header", path)
            length = int.from_bytes(head, "little")
            if length > MAX_HEADER_BYTES or length > size - 8:
                raise _error(
                    f"{path.name} is truncated or not a safetensors file: its header claims {length} bytes, "
                    f"the file has {size}",
                    path,
                    "download the file again",
                )
            raw = f.read(length)
    except FileNotFoundError:
        raise _error(f"{path.name} is missing", path) from None
    except OSError as e:
        raise XllmError("io", f"cannot read {path.name}: {e.strerror}", where=str(path)) from None
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as e:
        raise _error(f"the header of {path.name} is damaged: {e}", path, "download the file again") from None
    if not isinstance(header, dict):
        raise _error(f"the header of {path.name} is not a JSON object", path)
    base = 8 + length
    entries = {n: _entry(path, n, field, base, size) for n, field in header.items() if n != "__metadata__"}
    end = base
    for entry in sorted(entries.values(), key=lambda t: (t.start, t.nbytes)):
        if entry.start != end:
            what = "overlaps another tensor" if entry.start < end else "leaves a gap before it"
            raise _error(f"tensor {entry.name!r} of {path.name} {what}", path, "the file is damaged; download it again")
        end += entry.nbytes
    if end != size:
        raise _error(f"{path.name} has {size - end} bytes after its last tensor", path, "download the file again")
    return entries


def _entry(path: Path, name: str, field: object, base: int, size: int) -> TensorEntry:
    where = f"{path}: {name}"
    if not isinstance(field, dict):
        raise _error(f"tensor {name!r} has no description in the header of {path.name}", where)
    dtype, shape, offsets = field.get("dtype"), field.get("shape"), field.get("data_offsets")
    if not isinstance(dtype, str) or (dtype not in _DTYPES and dtype not in _OTHER_DTYPES):
        raise _error(f"tensor {name!r} has the unknown dtype {dtype!r}", where)
    dims = [_int(d) for d in shape] if isinstance(shape, list) else [None]
    ends = [_int(o) for o in offsets] if isinstance(offsets, list) else []
    if any(d is None for d in dims) or len(ends) != 2 or any(o is None for o in ends):
        raise _error(f"tensor {name!r} has a malformed shape or byte range", where)
    sizes = tuple(d for d in dims if d is not None)
    start, stop = (o for o in ends if o is not None)
    if base + stop > size:
        raise _error(
            f"{path.name} is truncated: tensor {name!r} ends at byte {base + stop}, the file has {size}",
            where,
            "download the file again",
        )
    if dtype in _DTYPES:
        count = 1
        for d in sizes:
            count *= d
        if stop - start != count * _DTYPES[dtype][0].itemsize:
            raise _error(f"tensor {name!r}: {stop - start} bytes do not hold {dtype}{list(sizes)}", where)
    elif stop < start:
        raise _error(f"tensor {name!r} has a malformed byte range", where)
    return TensorEntry(name, dtype, sizes, path, base + start, stop - start)


@dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint directory: `config` is config.json as it stands, `tensors` every tensor by its own name."""

    path: Path
    config: dict[str, Any]
    generation: dict[str, Any]  # generation_config.json, {} where there is none
    tensors: dict[str, TensorEntry]
    shards: tuple[Path, ...]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """Reads the JSON files and every shard's header. Raises XllmError("checkpoint" | "unsupported" | "io")."""
        root = Path(path)
        if not root.is_dir():
            raise _error("there is no such checkpoint directory", root, "give a local Hugging Face directory")
        config = read_json(root / "config.json")
        generation = root / "generation_config.json"
        tensors, shards = _read_shards(root)
        return cls(root, config, read_json(generation) if generation.exists() else {}, tensors, shards)

    def read(self, name: str) -> Array:
        """The tensor as stored, in fresh memory. The caller has checked that the name exists."""
        entry = self.tensors[name]
        where = f"{entry.file}: {name}"
        known = _DTYPES.get(entry.dtype)
        if known is None:
            raise XllmError(
                "unsupported",
                f"tensor {name!r} is stored as {entry.dtype}",
                where=where,
                help="use a checkpoint with F32, F16 or BF16 weights",
            )
        count = entry.nbytes // known[0].itemsize
        try:
            data = np.fromfile(entry.file, dtype=known[0], count=count, offset=entry.start)
        except OSError as e:
            raise XllmError("io", f"cannot read tensor {name!r}: {e.strerror or e}", where=where) from None
        if data.size != count:
            raise _error(f"{entry.file.name} shrank while it was read: tensor {name!r} is cut off", where)
        return data.reshape(entry.shape)


def _read_shards(root: Path) -> tuple[dict[str, TensorEntry], tuple[Path, ...]]:
    index = root / INDEX
    if not index.exists():
        single = root / SINGLE
        if single.exists():
            return read_header(single), (single,)
        others = sorted(
            p.name for p in root.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")
        )
        if others:
            raise _error(
                f"the weights are not safetensors but {others[0]}", root, "convert them with save_pretrained first"
            )
        raise _error(f"there are no weights: neither {SINGLE} nor {INDEX}", root)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise _error(f"{INDEX} has no weight_map", index)
    names: list[str] = []
    for tensor, file in sorted(weight_map.items()):
        # A shard is a file of this directory: no way out of it through the index.
        if not isinstance(file, str) or not file or file in (".", "..") or "/" in file or "\\" in file or "\0" in file:
            raise _error(f"{INDEX} puts tensor {tensor!r} into {file!r}, which is not a file name", index)
        if file not in names:
            names.append(file)
    shards = tuple(root / n for n in sorted(names))
    tensors: dict[str, TensorEntry] = {}
    for shard in shards:
        if not shard.exists():
            first = next(t for t, f in sorted(weight_map.items()) if f == shard.name)
            raise _error(f"shard {shard.name} is missing; tensor {first!r} is in it", shard, "download it")
        for name, entry in read_header(shard).items():
            if name in tensors:
                raise _error(f"tensor {name!r} is both in {tensors[name].file.name} and in {shard.name}", shard)
            tensors[name] = entry
    for tensor, file in sorted(weight_map.items()):
        if tensor not in tensors or tensors[tensor].file.name != file:
            raise _error(f"tensor {tensor!r} is not in {file}, where {INDEX} puts it", root / file)
    return tensors, shards
