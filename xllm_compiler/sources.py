"""Digests of source files: the part of a cache key that says which compiler it was."""

from __future__ import annotations

import hashlib
from pathlib import Path


def digest_sources(path: Path) -> str:
    """One digest over the names and contents of a Python file, or of a folder's Python and text files. `path` may be a
    link; where it lies does not count. Raises FileNotFoundError where there is none."""
    real = path.resolve(strict=True)
    inside = [real] if real.is_file() else sorted(file for kind in ("*.py", "*.txt") for file in real.rglob(kind))
    digest = hashlib.sha256()
    for file in inside:
        data = file.read_bytes()
        digest.update(f"{file.relative_to(real).as_posix()} {len(data)}\n".encode())
        digest.update(data)
    return digest.hexdigest()[:32]
