"""The threads that run steps. Owns them and the native context they meet in; must not know what a step is.

The waiting and waking is native code inside the artifact's library (`xllm_team_join`, `xllm_team_run`,
`xllm_team_stop`); here are only the threads that enter it, once each. Inside, they do not hold the interpreter's lock.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import threading
from pathlib import Path

from xllm_compiler.artifact import Contents
from xllm_compiler.errors import XllmError

_CTX_BYTES = 192
_CTX_TEAM_OFFSET = 140
_ALIGN = 64
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def load_library(file: Path | Contents) -> ctypes.CDLL:
    """Load a step library from a copy of it in memory.

    So the bytes that run are those that were checked, whatever happens to the file. Raises XllmError("artifact") when
    the loader refuses the library, and the errors of reading it.
    """
    code = file.read_bytes()
    fd = os.memfd_create(file.name.replace("/", "-"), os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with open(fd, "wb", closefd=False) as copy:
            copy.write(code)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        # Stays open: the loader takes two libraries of one name for the same, and the name is the descriptor's number.
        return ctypes.CDLL(f"/proc/self/fd/{fd}", mode=ctypes.RTLD_LOCAL)
    except OSError as error:
        os.close(fd)
        raise XllmError("artifact", f"the native code cannot be loaded: {error}", where=str(file)) from None


def native_function(library: ctypes.CDLL, name: str) -> ctypes._FuncPointer:
    """An exported function. Raises XllmError("artifact") when there is none of that name."""
    try:
        return library[name]
    except AttributeError:
        raise XllmError("artifact", f"the native code has no function {name}", where=str(library._name)) from None


class Team:
    """`size` members: the thread that calls `run`, and size - 1 threads of ours, started here."""

    def __init__(self, library: ctypes.CDLL, size: int) -> None:
        if size < 1:
            raise XllmError("option", f"a team needs at least one thread, got {size}")
        self.size = size
        self._memory = ctypes.create_string_buffer(_CTX_BYTES + _ALIGN - 1)
        base = (ctypes.addressof(self._memory) + _ALIGN - 1) & -_ALIGN
        ctypes.c_int32.from_address(base + _CTX_TEAM_OFFSET).value = size
        self._ctx = ctypes.c_void_p(base)
        self._run = native_function(library, "xllm_team_run")
        self._run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
        self._run.restype = ctypes.c_int32
        self._stop = native_function(library, "xllm_team_stop")
        self._stop.argtypes = [ctypes.c_void_p]
        self._stop.restype = ctypes.c_int32
        join = native_function(library, "xllm_team_join")
        join.argtypes = [ctypes.c_void_p, ctypes.c_int32]
        join.restype = ctypes.c_int32
        self._threads = [
            threading.Thread(target=join, args=(self._ctx, member), name=f"xllm-team-{member}", daemon=True)
            for member in range(1, size)
        ]
        for thread in self._threads:
            thread.start()
        self._closed = False

    def run(self, step: ctypes.c_void_p, args: ctypes.c_void_p) -> int:
        """Run one step on all members; its status, 0 when all is well. One caller at a time."""
        return int(self._run(self._ctx, step, args))

    def close(self) -> None:
        """End the threads. Not during a run; safe to call twice."""
        if not self._closed:
            self._closed = True
            self._stop(self._ctx)
            for thread in self._threads:
                thread.join()
