"""Digests of files: 128-bit xxh3, quick enough to check every byte at every start. Owns the rule for large files; must
not know which files there are."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

CHUNK = 64 << 20
"""A file up to this size has the digest that `xxhsum -H2` prints. A larger one is cut into chunks of this size, and its
digest is that of the chunks' digests (16 bytes each) one after the other, so that threads can share the work."""

_READ = 1 << 20  # stays in the second-level cache between the read and the hash


def digest_file(path: Path, threads: int = 1) -> str:
    """The digest of the file at `path`, 32 hexadecimal digits. xxhash lets go of the interpreter lock, so threads help.
    Raises OSError."""
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if size <= CHUNK:
            return _hash_range(file.fileno(), 0, size).hex()
        with ThreadPoolExecutor(max(1, threads)) as pool:
            parts = list(pool.map(lambda at: _hash_range(file.fileno(), at, CHUNK), range(0, size, CHUNK)))
    return str(xxhash.xxh3_128_hexdigest(b"".join(parts)))


def _hash_range(fd: int, start: int, length: int) -> bytes:
    state = xxhash.xxh3_128()
    buffer = memoryview(bytearray(min(_READ, max(length, 1))))
    at, end = start, start + length
    while at < end:
        count = os.preadv(fd, [buffer[: end - at]], at)
        if count == 0:
            break
        state.update(buffer[:count])
        at += count
    return bytes(state.digest())
