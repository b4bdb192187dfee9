"""A GGUF file written byte by byte, so that a test can write what no tool would."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

TEXT, LIST, FLOAT, WHOLE, TRUTH = 8, 9, 6, 4, 7
_PACKED = {WHOLE: "<I", FLOAT: "<f", TRUTH: "<?", 5: "<i"}


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def packed(kind: int, value: Any) -> bytes:
    """A value of a kind; a list as (kind of its items, items)."""
    if kind == LIST:
        inner, items = value
        return struct.pack("<IQ", inner, len(items)) + b"".join(packed(inner, item) for item in items)
    return text(value) if kind == TEXT else struct.pack(_PACKED[kind], value)


@dataclass
class Line:
    """Of the tensor table; the shape has the length of a row first. `offset` None: behind the one before."""

    name: str
    shape: Sequence[int] = (4, 4)
    kind: int = 0
    nbytes: int = 64
    offset: int | None = None


@dataclass
class Raw:
    """`keys`: (name, kind, value); a kind of -1 has a value that is bytes, its kind included."""

    keys: list[tuple[str, int, Any]]
    lines: list[Line]
    magic: bytes = b"GGUF"
    version: bytes = struct.pack("<I", 3)
    counts: tuple[int | None, int | None] = (None, None)
    align: int = 32
    after: bytes = b""

    def but(self, **changes: Any) -> Raw:
        return replace(self, **changes)

    def data(self) -> bytes:
        tensors, keys = (len(x) if n is None else n for n, x in zip(self.counts, (self.lines, self.keys), strict=True))
        out = bytearray(self.magic + self.version + struct.pack("<QQ", tensors, keys))
        for name, kind, value in self.keys:
            out += text(name) + (value if kind < 0 else struct.pack("<I", kind) + packed(kind, value))
        end = 0
        for line in self.lines:
            start = end if line.offset is None else line.offset
            out += text(line.name) + struct.pack("<I", len(line.shape))
            out += struct.pack(f"<{len(line.shape)}Q", *line.shape) + struct.pack("<IQ", line.kind, start)
            end = start + -(-line.nbytes // self.align) * self.align
        out += bytes(-len(out) % self.align) + bytes(sum(-(-t.nbytes // self.align) * self.align for t in self.lines))
        return bytes(out) + self.after
