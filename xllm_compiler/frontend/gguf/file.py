"""The head of a GGUF file: metadata and the table of its tensors, checked against the file's size.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. All numbers are little-endian: magic, version, number
of tensors, number of keys; the keys with their values; name, shape, type and offset of every tensor; the tensors'
bytes, each at a multiple of the alignment.

Somebody else wrote the file. No length in it is believed before the file is known to be that long.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from xllm_compiler.errors import XllmError
from xllm_compiler.frontend.files import MAX_TEXT_BYTES, damaged, open_regular
from xllm_compiler.frontend.gguf.blocks import BLOCKS, TYPES, UNREAD

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
"""Version 1 counted in 32 bits. It was in use for some weeks of 2023."""

ARCHITECTURE: Final = "general.architecture"

_MOST_KEYS: Final = 1 << 12
_MOST_TENSORS: Final = 1 << 16
_MOST_ITEMS: Final = 1 << 22
"""Items of all arrays together. The largest published files have 1.3 million: vocabulary, scores, kinds, merges."""
_MOST_NAME: Final = 256  # bytes; llama.cpp takes 63 of a tensor
_MOST_SIDE: Final = 1 << 40
_MOST_ALIGNMENT: Final = 1 << 20

_STRING, _ARRAY, _BOOL = 8, 9, 7
_NUMBERS: Final = {
    **{0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "u1", 10: "<u8", 11: "<i8", 12: "<f8"},
}
_PART: Final = re.compile(r"-(\d{5})-of-(\d{5})\.gguf\Z")
_AGAIN: Final = "download the file again"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One line of the table. `shape` is [out, in], as numpy has it; `start` is a byte of the file."""

    name: str
    type: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class GgufFile:
    """The head of one file. Values of `metadata` are numbers, truth values, texts, and lists of one kind of these."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    notes: tuple[str, ...] = ()

    @classmethod
    def open(cls, path: Path) -> GgufFile:
        """Reads metadata and table. Raises XllmError: "checkpoint" for a damaged file or a part of one, "unsupported"
        for another version, byte order or type of tensor, "io"."""
        with open_regular(path) as file:
            try:
                return _Reader(path, file).read()
            except OSError as error:
                raise XllmError("io", f"cannot read {path.name}: {error.strerror}", where=str(path)) from None


def is_gguf(path: Path) -> bool:
    """Whether a file claims to be one, by its name or its first bytes."""
    if path.name.endswith(".gguf"):
        return True
    with open_regular(path) as file:
        return file.read(len(MAGIC)) == MAGIC


class _Reader:
    """Reads a head front to back."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self.file = file
        self.size = os.fstat(file.fileno()).st_size
        self.at = 0
        self.items = 0  # of arrays, so far

    def read(self) -> GgufFile:
        tensors, keys = self._counts()
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = self._name("a key")
            if key in metadata:
                raise self._wrong(f"the key {key!r} stands there twice")
            metadata[key] = self._value(key, self._number("<u4", f"the kind of {key!r}"))
        _refuse_part(self.path, metadata)
        align = metadata.get("general.alignment", 32)
        if type(align) is not int or not 8 <= align <= _MOST_ALIGNMENT or align & (align - 1):
            raise self._wrong(f"general.alignment is {align!r}, not a power of two from 8 to {_MOST_ALIGNMENT}")
        lines = [self._line() for _ in range(tensors)]
        table, notes = self._table(lines, -(-self.at // align) * align, align)
        return GgufFile(self.path, metadata, table, notes)

    def _counts(self) -> tuple[int, int]:
        head = self._take(8, "a head") if self.size >= 8 else self._take(self.size, "a head")
        if head[:4] != MAGIC:
            raise damaged(f"{self.path.name} is no GGUF file: it begins with {head[:4]!r}", self.path)
        if len(head) < 8:
            raise self._truncated("its head", 24)
        version = int.from_bytes(head[4:], "little")
        if version & 0xFFFF == 0 and int.from_bytes(head[4:], "big") in (1, *VERSIONS):
            raise XllmError(
                "unsupported",
                f"{self.path.name} is a big-endian GGUF file",
                where=str(self.path),
                help="take the little-endian file, or convert it with gguf_convert_endian.py of llama.cpp",
            )
        if version not in VERSIONS:
            age = "newer than" if version > VERSIONS[-1] else "older than"
            raise XllmError(
                "unsupported",
                f"{self.path.name} is GGUF version {version}, {age} the versions that can be read: "
                f"{' and '.join(map(str, VERSIONS))}",
                where=str(self.path),
                help="convert the model again with llama.cpp's present tools",
            )
        tensors, keys = self._number("<u8", "the number of tensors"), self._number("<u8", "the number of keys")
        # A key takes 13 bytes at least, a tensor 32: what cannot be there is not looked for.
        for count, most, each, what in ((tensors, _MOST_TENSORS, 32, "tensors"), (keys, _MOST_KEYS, 13, "keys")):
            if count * each > self.size:
                raise self._truncated(f"a table of {count} {what}", count * each)
            if count > most:
                raise self._wrong(f"{count} {what}; at most {most} are read")
        return tensors, keys

    # ---- bytes

    def _take(self, count: int, what: str) -> bytes:
        if count > self.size - self.at:
            raise self._truncated(what, self.at + count)
        if self.at + count > MAX_TEXT_BYTES:
            raise self._wrong(f"{what} ends at byte {self.at + count}; a head has at most {MAX_TEXT_BYTES}")
        data = self.file.read(count)
        if len(data) < count:
            raise self._truncated(what, self.at + count)
        self.at += count
        return data

    def _number(self, dtype: str, what: str) -> int:
        return int.from_bytes(self._take(int(dtype[-1]), what), "little")

    def _text(self, what: str) -> str:
        data = self._take(self._number("<u8", what), what)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._wrong(f"{what} is not UTF-8 text: {error.reason} at byte {error.start}") from None

    def _name(self, what: str) -> str:
        name = self._text(f"the name of {what}")
        if not name or len(name) > _MOST_NAME or not name.isprintable():
            raise self._wrong(f"{what} is called {name[:80]!r}")
        return name

    # ---- metadata

    def _value(self, key: str, kind: int) -> Any:
        what = f"the value of {key!r}"
        if kind == _STRING:
            return self._text(what)
        if kind in _NUMBERS:
            return self._numbers(kind, 1, what)[0]
        if kind != _ARRAY:
            raise self._wrong(f"{what} is of the kind {kind}, which there is not")
        inner, count = self._number("<u4", what), self._number("<u8", what)
        each = 8 if inner == _STRING else np.dtype(_NUMBERS[inner]).itemsize if inner in _NUMBERS else 0
        if not each:
            raise self._wrong(f"{what} is a list of the kind {inner}, which cannot be read")
        if count * each > self.size - self.at:
            raise self._truncated(what, self.at + count * each)
        self.items += count
        if self.items > _MOST_ITEMS:
            raise self._wrong(f"{what} has {count} items; all lists together may have {_MOST_ITEMS}")
        if inner == _STRING:
            return [self._text(what) for _ in range(count)]
        return self._numbers(inner, count, what)

    def _numbers(self, kind: int, count: int, what: str) -> list[Any]:
        dtype = np.dtype(_NUMBERS[kind])
        found: list[Any] = np.frombuffer(self._take(count * dtype.itemsize, what), dtype).tolist()
        if kind == _BOOL:
            if any(value > 1 for value in found):
                raise self._wrong(f"{what} is neither true nor false")
            return [bool(value) for value in found]
        return found

    # ---- tensors

    def _line(self) -> tuple[str, str, tuple[int, ...], int]:
        """Name, type, shape and offset of the next tensor."""
        name = self._name("a tensor")
        rank = self._number("<u4", f"the rank of {name!r}")
        if not 1 <= rank <= 4:
            raise self._wrong(f"tensor {name!r} has {rank} axes")
        sides = [self._number("<u8", f"the shape of {name!r}") for _ in range(rank)]
        if not all(1 <= side <= _MOST_SIDE for side in sides) or math.prod(sides) > _MOST_SIDE:
            raise self._wrong(f"tensor {name!r} has shape {sides[::-1]}")
        kind = self._number("<u4", f"the type of {name!r}")
        offset = self._number("<u8", f"the offset of {name!r}")
        if kind not in TYPES:
            what = f"of type {UNREAD[kind]}" if kind in UNREAD else f"of type number {kind}, which is not known"
            raise XllmError(
                "unsupported",
                f"tensor {name!r} is {what}",
                where=f"{self.path}: {name}",
                help=f"take a file whose tensors are {', '.join(TYPES.values())}",
            )
        return name, TYPES[kind], tuple(sides[::-1]), offset

    def _table(
        self, lines: list[tuple[str, str, tuple[int, ...], int]], base: int, align: int
    ) -> tuple[dict[str, TensorInfo], tuple[str, ...]]:
        """The tensors by name: none stands there twice, overlaps another or leaves the file."""
        table: dict[str, TensorInfo] = {}
        for name, kind, shape, offset in lines:
            if name in table:
                raise self._wrong(f"tensor {name!r} stands there twice")
            block = BLOCKS[kind]
            if shape[-1] % block.values:
                raise self._wrong(f"tensor {name!r} has rows of {shape[-1]}, {kind} has blocks of {block.values}")
            nbytes = math.prod(shape) // block.values * block.nbytes
            if offset % align:
                raise self._wrong(f"tensor {name!r} begins at byte {offset}, which is no multiple of {align}")
            if base + offset + nbytes > self.size:
                raise self._truncated(f"tensor {name!r}", base + offset + nbytes)
            table[name] = TensorInfo(name, kind, shape, base + offset, nbytes)
        ordered = sorted(table.values(), key=lambda tensor: tensor.start)
        for before, after in pairwise(ordered):
            end = before.start + before.nbytes
            if after.start < end:
                raise self._wrong(f"tensor {after.name!r} overlaps {before.name!r}")
            if after.start >= end + align:
                raise self._wrong(f"{after.start - end} bytes lie unused before tensor {after.name!r}")
        end = ordered[-1].start + ordered[-1].nbytes if ordered else base
        if ordered and ordered[0].start != base:
            raise self._wrong(f"{ordered[0].start - base} bytes lie unused before tensor {ordered[0].name!r}")
        left = self.size - end
        return table, (f"{self.path.name} has {left} bytes after its last tensor",) if left >= align else ()

    # ---- errors

    def _wrong(self, what: str) -> XllmError:
        return damaged(f"{self.path.name} is damaged: {what}", self.path, _AGAIN)

    def _truncated(self, what: str, end: int) -> XllmError:
        return damaged(
            f"{self.path.name} is truncated: {what} ends at byte {end}, the file has {self.size}", self.path, _AGAIN
        )


def _refuse_part(path: Path, metadata: dict[str, Any]) -> None:
    """One file of several holds a part of the tensors."""
    named = _PART.search(path.name)
    count = metadata.get("split.count", 0)
    if (named is not None and int(named[2]) > 1) or (type(count) is int and count > 1):
        raise XllmError(
            "unsupported",
            f"{path.name} is one part of a split GGUF file",
            where=str(path),
            help="join the parts: llama-gguf-split --merge FIRST-PART OUT.gguf",
        )
