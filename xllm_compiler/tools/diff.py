"""`xllm-compile diff A B`: what differs between two artifacts, from the reasons (key) to the bytes of each weight."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import xxhash

from xllm_compiler.artifact import MODULE, WEIGHTS, Contents, Manifest, check_files, read_manifest
from xllm_compiler.artifact.decode import encode
from xllm_compiler.errors import XllmError

_SEPARATE = ("id", "key", "files", "weights")


def add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Flags of `diff`."""
    parser.add_argument("a", type=Path, metavar="A")
    parser.add_argument("b", type=Path, metavar="B")
    parser.add_argument("--lines", type=int, default=40, help="lines of differing IR to show (default 40)")


def main(args: argparse.Namespace) -> int:
    """Print the differences; 0 when there are none, else 1. Both artifacts are checked to be whole first."""
    a, b = read_manifest(args.a), read_manifest(args.b)
    check_files(args.a, a)
    check_files(args.b, b)
    if a == b:
        print(f"identical: {a.id}")
        return 0
    for title, lines in (
        ("key", _values(a.key, b.key)),
        ("manifest", _manifest(a, b)),
        ("weights", _weights(args.a, a, args.b, b)),
        ("files", _files(a, b)),
        (MODULE, _module(Contents(args.a, a), Contents(args.b, b), args.lines)),
    ):
        found = list(lines)
        if found:
            print("\n".join([title, *(f"  {line}" for line in found)]))
    return 1


def _values(a: Any, b: Any, path: str = "") -> Iterator[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        for name in sorted({*a, *b}):
            here = f"{path}.{name}" if path else name
            if name not in b:
                yield f"- {here}: {a[name]!r}"
            elif name not in a:
                yield f"+ {here}: {b[name]!r}"
            else:
                yield from _values(a[name], b[name], here)
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (left, right) in enumerate(zip(a, b, strict=True)):
            yield from _values(left, right, f"{path}[{i}]")
    elif a != b:
        yield f"~ {path}: {a!r} -> {b!r}"


def _manifest(a: Manifest, b: Manifest) -> Iterator[str]:
    left, right = ({n: v for n, v in encode(m).items() if n not in _SEPARATE} for m in (a, b))
    yield from _values(left, right)


def _weights(path_a: Path, a: Manifest, path_b: Path, b: Manifest) -> Iterator[str]:
    left = {weight.name: weight for weight in a.weights.tensors}
    right = {weight.name: weight for weight in b.weights.tensors}
    with open(path_a / WEIGHTS, "rb") as file_a, open(path_b / WEIGHTS, "rb") as file_b:
        for name in sorted({*left, *right}):
            if name not in right or name not in left:
                yield f"{'-' if name in left else '+'} {name}"
                continue
            x, y = left[name], right[name]
            changed = [
                f"{field} {getattr(x, field)} -> {getattr(y, field)}"
                for field in ("layout", "dtype", "shape", "bytes")
                if getattr(x, field) != getattr(y, field)
            ]
            if changed:
                yield f"~ {name}: {', '.join(changed)}"
            elif _digest(file_a, x.offset, x.bytes) != _digest(file_b, y.offset, y.bytes):
                yield f"~ {name}: other values"


def _digest(file: Any, offset: int, count: int) -> bytes:
    state = xxhash.xxh3_128()
    file.seek(offset)
    while count > 0:
        data = file.read(min(count, 1 << 20))
        if not data:
            raise XllmError("artifact", "weights.bin shrank while it was read")
        state.update(data)
        count -= len(data)
    return bytes(state.digest())


def _files(a: Manifest, b: Manifest) -> Iterator[str]:
    for name in sorted({*a.files, *b.files}):
        if name not in b.files:
            yield f"- {name}"
        elif name not in a.files:
            yield f"+ {name}"
        elif a.files[name] != b.files[name]:
            yield f"~ {name}: {a.files[name].bytes} -> {b.files[name].bytes} bytes, other content"


def _module(a: Contents, b: Contents, limit: int) -> Iterator[str]:
    left, right = ((files / MODULE).read_bytes().decode("utf-8", "replace").splitlines() for files in (a, b))
    lines = difflib.unified_diff(left, right, "A", "B", lineterm="", n=2)
    yield from islice(lines, limit)
    if next(lines, None) is not None:
        yield "..."
