"""Keeps mapped weights from changing while they are served.

The weight file is mapped, not copied: that costs neither time nor memory, but whoever changes the file changes the
model. There are two protections; the guard takes the better one that the file system has:

- a lease (fcntl(2), F_SETLEASE). The kernel lets nobody open the file for writing, or truncate it, before we agree,
  for up to 45 s. We read the file into our own memory, put that in place of the mapping, and agree. Answers stay
  right. Without memory for that, the engine ends with an error first.
- a watch, where the file belongs to somebody else or its file system has no leases. Twice a second we look at the
  file's size and times. After a change no output is delivered until every byte was compared with its digest again. A
  file that differs, or was cut, ends the engine. Outputs delivered before the change was seen stay delivered. A step
  that reads where the file was cut ends the process (SIGBUS): nothing can prevent that.
"""

from __future__ import annotations

import ctypes
import fcntl
import logging
import mmap
import os
import signal
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final, Literal, Protocol

from xllm_compiler.errors import XllmError
from xllm_compiler.runtime import host

Protection = Literal["lease", "watch", "copy", "none"]

_INTERVAL: Final = 0.1  # seconds between looks at a lease; a writer waits about as long, and for the copy
_WATCH_EVERY: Final = 4  # looks at a lease per look at the file's times
_SPARE: Final = 256 << 20  # bytes that a copy of the weights must leave free
_CHUNK: Final = 8 << 20
_F_SETSIG: Final = 10  # fcntl(2); not named in Python
_MREMAP: Final = 1 | 2  # MREMAP_MAYMOVE | MREMAP_FIXED

log = logging.getLogger("xllm")


class Served(Protocol):
    """What the guard needs of the engine."""

    def fail(self, error: XllmError) -> None:
        """End all that runs and refuse what comes; no step is running when this returns."""

    def hold(self, check: Callable[[], None]) -> None:
        """Tell nobody anything before `check` has returned; an error of it is as for `fail`."""

    @property
    def ended(self) -> bool:
        """Whether no step will ever run again."""


class WeightsGuard:
    """Guards one mapped file. `fd` is a descriptor of the guard's own, opened for reading."""

    def __init__(self, path: Path, fd: int, mapped: mmap.mmap | None, address: int, check: Callable[[], None]) -> None:
        """`mapped`: the whole file at `address`; None where it is empty. `check`: compares it with its digest, and
        raises when it differs."""
        self._path, self._fd, self._mapped, self._address, self._check = path, fd, mapped, address, check
        self._seen = os.fstat(fd)
        self._closing = weakref.finalize(self, os.close, fd)
        self.protection: Protection = "none"

    def describe(self) -> str:
        """One line for a log."""
        return {
            "lease": "a lease keeps others from changing the file",
            "watch": "the file is watched for changes, since there is no lease on it: do not write into it",
            "copy": "served from a private copy",
            "none": "nothing protects the file from changes",
        }[self.protection]

    def watch(self, engine: Served) -> None:
        """Begin, in a thread that ends with the engine."""
        if self._mapped is None:
            return
        self.protection = "lease" if _take_lease(self._fd) else "watch"
        self._look_at_file(engine)  # it may have changed since it was opened
        threading.Thread(target=self._run, args=(weakref.ref(engine),), name="xllm-guard", daemon=True).start()

    def close(self) -> None:
        """Give the lease and the descriptor back. Safe to call twice."""
        if self._closing.alive and self.protection == "lease":
            with suppress(OSError):  # the mapping keeps the open file, and with it the lease
                fcntl.fcntl(self._fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        self._closing()

    def _run(self, engine: weakref.ref[Served]) -> None:
        pause, turn = threading.Event(), 0
        while self.protection in ("lease", "watch"):
            pause.wait(_INTERVAL)
            turn += 1
            served = engine()
            if served is None or served.ended:
                break
            try:
                if self.protection == "lease":
                    self._look_at_lease(served)
                elif turn % _WATCH_EVERY == 0:
                    self._look_at_file(served)
            except Exception as error:  # the guard must not end silently
                served.fail(self._changed(f"its watch failed: {error}"))
                break
            del served  # or the engine could never end
        self.close()

    def _look_at_lease(self, engine: Served) -> None:
        if fcntl.fcntl(self._fd, fcntl.F_GETLEASE) == fcntl.F_RDLCK:
            return
        log.warning("%s is about to be changed by another process; reading it into memory first", self._path)
        why = self._copy()
        if why is None:
            self.protection = "copy"
            log.warning("serving from a private copy of %s from now on; restart to free its memory", self._path)
        else:
            self.protection = "none"
            engine.fail(self._changed(why))
        fcntl.fcntl(self._fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)

    def _look_at_file(self, engine: Served) -> None:
        now, seen = os.fstat(self._fd), self._seen
        if _times(now) == _times(seen):
            return
        self._seen = now
        if now.st_size != seen.st_size:
            self.protection = "none"
            engine.fail(self._changed(f"it has {now.st_size} bytes now, not {seen.st_size}"))
        elif now.st_nlink != seen.st_nlink and now.st_mtime_ns == seen.st_mtime_ns:
            return  # a name of it was added or removed, as by a replacement
        else:
            log.warning("%s was touched while it is served; checking every byte again", self._path)
            engine.hold(self._check_again)

    def _check_again(self) -> None:
        try:
            self._check()
        except XllmError as error:
            raise self._changed(error.message) from None

    def _copy(self) -> str | None:
        """Put a private copy in the place of the mapping. The reason when that cannot be done."""
        assert self._mapped is not None
        size = len(self._mapped)
        try:
            if host.available_memory() < size + _SPARE:
                return "there is no memory for a copy of it"
            before = _times(os.fstat(self._fd))
            page = mmap.PAGESIZE
            room = -(-size // page) * page
            libc = ctypes.CDLL(None, use_errno=True)
            libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            anonymous = (ctypes.c_void_p(0), ctypes.c_size_t(room), mmap.PROT_READ | mmap.PROT_WRITE, flags, -1)
            new = libc.mmap(*anonymous, ctypes.c_long(0))
            if new in (None, _FAILED):
                return f"there is no memory for a copy of it: {os.strerror(ctypes.get_errno())}"
            libc.madvise(ctypes.c_void_p(new), ctypes.c_size_t(room), getattr(mmap, "MADV_HUGEPAGE", 14))
            if not _read_into(self._fd, new, size) or _times(os.fstat(self._fd)) != before:
                libc.munmap(ctypes.c_void_p(new), ctypes.c_size_t(room))
                return "it changed before it was read into memory"
            libc.mprotect(ctypes.c_void_p(new), ctypes.c_size_t(room), mmap.PROT_READ)
            # One system call for all readers: none of them sees anything between the file and the copy.
            sizes = (ctypes.c_size_t(room), ctypes.c_size_t(room))
            moved = libc.mremap(ctypes.c_void_p(new), *sizes, _MREMAP, ctypes.c_void_p(self._address))
            if moved != self._address:
                return f"its copy cannot be put in its place: {os.strerror(ctypes.get_errno())}"
        except XllmError as error:
            return error.message
        except OSError as error:
            return f"it cannot be read into memory: {error.strerror}"
        return None

    def _changed(self, why: str) -> XllmError:
        return XllmError(
            "artifact",
            f"{self._path.name} changed while it was served: {why}",
            where=str(self._path),
            help="restart with a sound artifact; replace one by renaming a new directory into its place, as "
            "xllm-compile -o does, never by writing into its files",
        )


_FAILED: Final = ctypes.c_void_p(-1).value


def _times(stat: os.stat_result) -> tuple[int, int, int]:
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _take_lease(fd: int) -> bool:
    """Take the lease; whether the kernel granted it.

    The kernel asks us by a signal, which by default ends the process. So name a signal that is ignored, and then none:
    the guard's thread looks by itself.
    """
    try:
        fcntl.fcntl(fd, _F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(fd, fcntl.F_SETOWN, 0)
    except OSError:
        return False
    return True


def _read_into(fd: int, address: int, size: int) -> bool:
    """Fill memory from a file; False where the file ends early."""
    at = 0
    while at < size:
        count = os.preadv(fd, [(ctypes.c_char * min(_CHUNK, size - at)).from_address(address + at)], at)
        if count == 0:
            return False
        at += count
    return True
