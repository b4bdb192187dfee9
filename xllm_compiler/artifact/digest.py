"""Digests of files: 128-bit xxh3, quick enough to check every byte at every start. Owns the rule for large files; must
not know which files there are."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

CHUNK = 64 << 20
"""A file up to this size has the digest that `xxhsum -H2` prints. A larger one is cut into chunks of this size, and its
digest is that of the chunks' digests (16 bytes each) one after the other, so that threads can share the work."""

_MADV_POPULATE_READ = 22  # Linux 5.14; not named in Python 3.11
_FAULTED = 2 << 20  # of a mapped file, brought in at a time
_READ = 1 << 20  # stays in the second-level cache between the read and the hash


def digest_file(path: Path, threads: int = 1) -> str:
    """The digest of the file at `path`, 32 hexadecimal digits. xxhash lets go of the interpreter lock, so threads help.
    Raises OSError."""
    with open(path, "rb", buffering=0) as file:
        return digest_open(file.fileno(), threads)


def digest_open(fd: int, threads: int = 1) -> str:
    """The same of an open file. Raises OSError."""
    size = os.fstat(fd).st_size
    return _digest(size, threads, lambda start, length: _hash_read(fd, start, length))


def digest_bytes(data: bytes) -> str:
    """The same of bytes in memory."""
    return _digest(len(data), 1, lambda start, length: xxhash.xxh3_128_digest(memoryview(data)[start : start + length]))


def digest_mapped(memory: mmap.mmap, threads: int = 1) -> str:
    """The same of a whole file that is mapped, without a copy of it. All its pages are in the page table afterwards,
    which keeps a page fault for each out of the first step. Raises OSError."""
    return _digest(len(memory), threads, lambda start, length: _hash_mapped(memory, start, length))


def _digest(size: int, threads: int, hash_range: Callable[[int, int], bytes]) -> str:
    if size <= CHUNK:
        return hash_range(0, size).hex()
    with ThreadPoolExecutor(max(1, threads)) as pool:
        parts = list(pool.map(lambda at: hash_range(at, min(CHUNK, size - at)), range(0, size, CHUNK)))
    return str(xxhash.xxh3_128_hexdigest(b"".join(parts)))


def _hash_read(fd: int, start: int, length: int) -> bytes:
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


def _hash_mapped(memory: mmap.mmap, start: int, length: int) -> bytes:
    state = xxhash.xxh3_128()
    with memoryview(memory) as view:
        for at in range(start, start + length, _FAULTED):
            count = min(_FAULTED, start + length - at)
            try:
                # a page that cannot be read is an error here, and would end the process where it is used
                memory.madvise(_MADV_POPULATE_READ, at, count)
            except OSError as error:
                if error.errno != errno.EINVAL:  # an older Linux: pages come when they are read
                    raise
            with view[at : at + count] as part:
                state.update(part)
    return bytes(state.digest())
