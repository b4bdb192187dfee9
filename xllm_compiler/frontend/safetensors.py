"""One safetensors file: its header, checked, and the bytes of a tensor. Every failure is an XllmError("checkpoint")
that names the file and the tensor. It must not know which files a checkpoint has.

The header is parsed once and tensor bytes are read when asked for, with plain reads, so that the file's pages do not
count as this process's memory. File format: https://github.com/huggingface/safetensors#format (8 bytes little-endian
header length, a JSON header with `dtype`, `shape` and `data_offsets` per tensor, then the bytes).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from xllm_compiler.errors import XllmError
from xllm_compiler.frontend.files import damaged, open_regular, parse_json

Array = np.ndarray[Any, np.dtype[Any]]

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself

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

    @property
    def where(self) -> str:
        """File and tensor, for errors."""
        return f"{self.file}: {self.name}"

    def read(self, first: int = 0, count: int | None = None) -> Array:
        """`count` values from `first` on, flat and in fresh memory; by default all. Raises XllmError."""
        known = _DTYPES.get(self.dtype)
        if known is None:
            raise XllmError(
                "unsupported",
                f"tensor {self.name!r} is stored as {self.dtype}",
                where=self.where,
                help="use a checkpoint with F32, F16 or BF16 weights",
            )
        size = known[0].itemsize
        wanted = self.nbytes // size - first if count is None else count
        return self.stored(known[0], first * size, wanted)

    def stored(self, dtype: np.dtype[Any], offset: int, count: int) -> Array:
        """`count` numbers of the tensor's bytes, from byte `offset` on. Raises XllmError."""
        try:
            data = np.fromfile(self.file, dtype=dtype, count=count, offset=self.start + offset)
        except OSError as e:
            raise XllmError("io", f"cannot read tensor {self.name!r}: {e.strerror or e}", where=self.where) from None
        if data.size != count:
            raise damaged(f"{self.file.name} shrank while it was read: tensor {self.name!r} is cut off", self.where)
        return data


def _int(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file by name, checked against the file's size.

    Raises XllmError("checkpoint") when the file is missing, truncated, has overlapping or missing ranges, a dtype
    nobody knows, or a shape whose size is not that of its range.
    """
    try:
        with open_regular(path) as f:
            size = os.fstat(f.fileno()).st_size
            head = f.read(8)
            if len(head) < 8:
                raise damaged(f"{path.name} is truncated: {size} bytes, too short for a safetensors header", path)
            length = int.from_bytes(head, "little")
            if length > MAX_HEADER_BYTES or length > size - 8:
                raise damaged(
                    f"{path.name} is truncated or not a safetensors file: its header claims {length} bytes, "
                    f"the file has {size}",
                    path,
                    "download the file again",
                )
            raw = f.read(length)
    except OSError as e:
        raise XllmError("io", f"cannot read {path.name}: {e.strerror}", where=str(path)) from None
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as e:
        raise damaged(f"the header of {path.name} is damaged: {e}", path, "download the file again") from None
    header = parse_json(text, path, f"the header of {path.name}")
    if not isinstance(header, dict):
        raise damaged(f"the header of {path.name} is not a JSON object", path)
    base = 8 + length
    entries = {n: _entry(path, n, field, base, size) for n, field in header.items() if n != "__metadata__"}
    end = base
    for entry in sorted(entries.values(), key=lambda t: (t.start, t.nbytes)):
        if entry.start != end:
            what = "overlaps another tensor" if entry.start < end else "leaves a gap before it"
            raise damaged(
                f"tensor {entry.name!r} of {path.name} {what}", path, "the file is damaged; download it again"
            )
        end += entry.nbytes
    if end != size:
        raise damaged(f"{path.name} has {size - end} bytes after its last tensor", path, "download the file again")
    return entries


def _entry(path: Path, name: str, field: object, base: int, size: int) -> TensorEntry:
    where = f"{path}: {name}"
    if not isinstance(field, dict):
        raise damaged(f"tensor {name!r} has no description in the header of {path.name}", where)
    dtype, shape, offsets = field.get("dtype"), field.get("shape"), field.get("data_offsets")
    if not isinstance(dtype, str) or (dtype not in _DTYPES and dtype not in _OTHER_DTYPES):
        raise damaged(f"tensor {name!r} has the unknown dtype {dtype!r}", where)
    dims = [_int(d) for d in shape] if isinstance(shape, list) else [None]
    ends = [_int(o) for o in offsets] if isinstance(offsets, list) else []
    if any(d is None for d in dims) or len(ends) != 2 or any(o is None for o in ends):
        raise damaged(f"tensor {name!r} has a malformed shape or byte range", where)
    sizes = tuple(d for d in dims if d is not None)
    start, stop = (o for o in ends if o is not None)
    if base + stop > size:
        raise damaged(
            f"{path.name} is truncated: tensor {name!r} ends at byte {base + stop}, the file has {size}",
            where,
            "download the file again",
        )
    if dtype in _DTYPES:
        count = 1
        for d in sizes:
            count *= d
        if stop - start != count * _DTYPES[dtype][0].itemsize:
            raise damaged(f"tensor {name!r}: {stop - start} bytes do not hold {dtype}{list(sizes)}", where)
    elif stop < start:
        raise damaged(f"tensor {name!r} has a malformed byte range", where)
    return TensorEntry(name, dtype, sizes, path, base + start, stop - start)
