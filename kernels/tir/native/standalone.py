"""Runs one kernel by itself on numpy arrays, with a team of any size: for tests, benchmarks and the tile search."""

from __future__ import annotations

import ctypes
import os
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm.tirx.script.builder import ir as T

from xllm_compiler.kernels.tir.codegen.kernel import Kernel
from xllm_compiler.kernels.tir.codegen.work_stealing import WORDS, WORK_QUEUES
from xllm_compiler.kernels.tir.isa.levels import Isa
from xllm_compiler.kernels.tir.linear.linear import NEXT, NEXT_BYTES, NEXT_PANELS
from xllm_compiler.kernels.tir.native.module import NativeModule
from xllm_compiler.kernels.tir.native.team import BARRIER_BYTES, CTX_BYTES, CTX_TEAM_OFFSET

_MOST_MEMBERS = max(64, os.cpu_count() or 1)
_STEP = "xllm_fn_kernel"


def aligned(shape: tuple[int, ...], dtype: Any, alignment: int = 64) -> npt.NDArray[Any]:
    """A zeroed array whose data is aligned to `alignment` bytes."""
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.zeros(count + alignment, np.uint8)
    start = -memory.ctypes.data % alignment
    result: npt.NDArray[Any] = memory[start : start + count].view(dtype).reshape(shape)
    return result


class Team:
    """Threads 1 .. size-1, which stay in the native team runtime of `library` until `close`."""

    def __init__(self, library: ctypes.CDLL, size: int) -> None:
        self._library, self.size = library, size
        self._ctx = aligned((CTX_BYTES,), np.uint8)
        self._ctx[CTX_TEAM_OFFSET : CTX_TEAM_OFFSET + 4].view(np.int32)[0] = size
        pointer = ctypes.c_void_p(self._ctx.ctypes.data)
        self._pointer = pointer
        self._threads = [
            threading.Thread(target=library.xllm_team_join, args=(pointer, member), daemon=True)
            for member in range(1, size)
        ]
        for thread in self._threads:
            thread.start()

    def run(self, step: Any, args: Any) -> int:
        """One run of `step(args, member, team)` on all members; its status."""
        return int(self._library.xllm_team_run(self._pointer, ctypes.cast(step, ctypes.c_void_p), args))

    def close(self) -> None:
        """Ends the threads."""
        self._library.xllm_team_stop(self._pointer)
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Team:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def call_with(module: NativeModule, kernel: Kernel, args: Any, member: Any, team: Any) -> None:
    """Emits, inside an entry of `module`, a call of `kernel` with the arguments of the entry, in the same order."""
    values = [args[i] if arg.pointer else T.Cast("int32", args[i]) for i, arg in enumerate(kernel.args[:-2])]
    module.call(kernel, values, member, team)


def completed(kernel: Kernel, values: Sequence[Any], queues: npt.NDArray[Any]) -> list[Any]:
    """All arguments but member and team: `values`, with `queues` where the kernel steals work, and no next layer where
    it is a linear one. Raises TypeError if their number is not the kernel's."""
    given = list(values)
    for index, arg in enumerate(kernel.args):
        if arg in (WORK_QUEUES, NEXT):
            given.insert(index, queues)
        elif arg in (NEXT_PANELS, NEXT_BYTES):
            given.insert(index, 0)
    if len(given) != len(kernel.args) - 2:
        raise TypeError(f"{kernel.describe()} called with {len(given)} arguments")
    return given


class Standalone:
    """One compiled kernel: `Standalone(kernel, isa)(x, w, y, rows, team=2)`. The arrays are in the order of arguments;
    work queues and the next layer's weight are left out."""

    def __init__(self, kernel: Kernel, isa: Isa) -> None:
        self.kernel = kernel
        self._args = kernel.args[:-2]
        module = NativeModule(isa)
        with module.entry(_STEP) as (args, member, team):
            call_with(module, kernel, args, member, team)
            module.barrier(args[len(self._args)], team)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "kernel.so"
            module.write_shared(path)
            self.code = ctypes.CDLL(str(path))
            self.object = path.read_bytes()
        self._barrier = aligned((BARRIER_BYTES,), np.uint8)
        self._queues = aligned((_MOST_MEMBERS, WORDS), np.int64)

    def pack(self, *values: Any) -> Any:
        """The native argument array. It points at the arrays' memory, which must outlive it."""
        packed = (ctypes.c_int64 * (len(self._args) + 1))()
        given = completed(self.kernel, values, self._queues)
        for index, (value, arg) in enumerate(zip(given, self._args, strict=True)):
            if arg.pointer and not value.flags.c_contiguous:
                raise TypeError(f"{arg.name} is not contiguous")
            packed[index] = value.ctypes.data if arg.pointer else value
        packed[len(given)] = self._barrier.ctypes.data
        return packed

    @property
    def step(self) -> Any:
        """The native step function."""
        return self.code[_STEP]

    def __call__(self, *values: Any, team: int = 1) -> None:
        """Runs the kernel once. `values`: arrays and sizes in the order of `kernel.args`."""
        with Team(self.code, team) as threads:
            status = threads.run(self.step, self.pack(*values))
        if status != 0:
            raise RuntimeError(f"{self.kernel.symbol} returned {status}")
