"""Standard output and error that cannot block the server: a thread writes, and only that thread may block.

A pipe that nobody reads is full after 64 KB. Then whoever writes to it waits: the log, with it the event loop, and
every request. Lines beyond a bound are dropped and counted. The count is printed when the pipe moves again. The
process' two streams, and faulthandler's, are set up here.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import os
import queue
import select
import sys
import threading
import time
from collections.abc import Iterator

_MOST_PIECES = 4096  # that wait for the thread
_PIECE = 4096  # characters; a traceback is several
_EXIT_SECONDS = 1.0  # for what is left when the process ends


class Outlet(io.TextIOBase):
    """A text stream over a file descriptor whose `write` never waits."""

    def __init__(self, fd: int, name: str) -> None:
        super().__init__()
        self.name = name
        self.dropped = 0  # pieces, which are lines but for very long ones
        self._fd = fd
        self._queue: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._line = ""
        self._told = 0
        self._lock = threading.RLock()  # a signal's handler may log in the middle of a write
        self._given = 0
        self._written = 0
        threading.Thread(target=self._run, name=f"xllm-{name}", daemon=True).start()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return "utf-8"

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._fd

    def isatty(self) -> bool:
        return os.isatty(self._fd)

    def write(self, text: str, /) -> int:
        with self._lock:
            whole, newline, self._line = (self._line + text).rpartition("\n")
            for line in (whole + newline).splitlines(keepends=True):
                for at in range(0, len(line), _PIECE):
                    self._put(line[at : at + _PIECE])
            if len(self._line) > _PIECE:
                self._put(self._line)
                self._line = ""
        return len(text)

    def _put(self, text: str) -> None:
        if self._queue.qsize() >= _MOST_PIECES:
            self.dropped += 1
            return
        self._given += 1
        self._queue.put(text.encode("utf-8", "backslashreplace"))

    def drain(self, seconds: float) -> None:
        """Wait until all is written, for so long at most."""
        with self._lock:
            if self._line:
                self._put(self._line)
                self._line = ""
        end = time.monotonic() + seconds
        while self._written < self._given and time.monotonic() < end:
            time.sleep(0.002)

    def _run(self) -> None:
        while True:
            if self._queue.empty() and self.dropped > self._told:
                missing, self._told = self.dropped - self._told, self.dropped
                self._write(f"{missing} lines were dropped here: nobody was reading\n".encode())
            self._write(self._queue.get())
            self._written += 1

    def _write(self, data: bytes) -> None:
        """Without Python's own buffers: a thread stuck inside one would abort the interpreter's end."""
        while data:
            try:
                data = data[os.write(self._fd, data) :]
            except BlockingIOError:  # whoever shares the pipe may have made it so
                select.select([], [self._fd], [])
            except OSError:  # the reader is gone, or the disk is full: nobody to tell
                return


def dropped_lines() -> dict[str, int]:
    """How many lines of each stream were dropped."""
    return {stream.name: stream.dropped for stream in (sys.stdout, sys.stderr) if isinstance(stream, Outlet)}


def drain_outlets(seconds: float = _EXIT_SECONDS) -> None:
    """Give what was written a moment to leave, before the process ends."""
    end = time.monotonic() + seconds
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, Outlet):
            stream.drain(max(0.0, end - time.monotonic()))


@contextlib.contextmanager
def outlets() -> Iterator[None]:
    """Outlets in the place of sys.stdout and sys.stderr, and fatal signals reported, until the end of the block.

    A stream that was closed when the process started stays so. Its number is kept from other files, though: what else
    writes to it would write into them, and libuv aborts when it closes one of them.
    """
    before = sys.stdout, sys.stderr
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it takes the lowest number that is free
    with _fatal_signals():
        try:
            for name, fd in (("stdout", 1), ("stderr", 2)):
                stream = getattr(sys, name)
                if stream is not None:
                    stream.flush()
                    setattr(sys, name, Outlet(fd, name))
            yield
        finally:
            drain_outlets()
            sys.stdout, sys.stderr = before


@contextlib.contextmanager
def _fatal_signals() -> Iterator[None]:
    """SIGSEGV, SIGBUS and their like leave every thread's stack on stderr, unless that would block."""
    if sys.stderr is None:
        yield
        return
    with contextlib.ExitStack() as stack:
        fd = 2
        with contextlib.suppress(OSError):  # a socket cannot be opened again; nor can another user's file
            fd = os.open("/proc/self/fd/2", os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
            stack.callback(os.close, fd)
        faulthandler.enable(fd, all_threads=True)
        stack.callback(faulthandler.disable)
        yield
