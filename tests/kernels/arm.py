"""Kernels for 64-bit Arm, run on this machine by qemu: `Emulated` stands in for `Standalone`."""

from __future__ import annotations

import functools
import shutil
import subprocess
import tempfile
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xllm_compiler.kernels.tir.codegen.kernel import Kernel
from xllm_compiler.kernels.tir.codegen.work_stealing import WORDS
from xllm_compiler.kernels.tir.isa.levels import Isa
from xllm_compiler.kernels.tir.native.linker import find_linker
from xllm_compiler.kernels.tir.native.module import NativeModule
from xllm_compiler.kernels.tir.native.standalone import call_with, completed
from xllm_compiler.kernels.tir.native.team import BARRIER_BYTES

NEEDED = (
    "These tests run Arm's code under qemu, with Arm's libc and, to build their driver, a cross compiler. "
    "On Debian 12: apt-get install qemu-user libc6-arm64-cross, and pip install -e '.[cross]'"
)
PROCESSORS = {"neon": "neoverse-n1", "neon_bf16": "max"}  # the first knows none of the second's instructions
_ROOT = Path("/usr/aarch64-linux-gnu")
_GAP = 192  # bytes between arrays: NaN as bf16 and as f32, and nobody may write there


@functools.cache
def driver() -> Path:
    """The program of arm_driver.c; fails where something is not installed."""
    if not shutil.which("qemu-aarch64") or not (_ROOT / "lib" / "ld-linux-aarch64.so.1").exists():
        pytest.fail(NEEDED, pytrace=False)
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "driver"
    weakref.finalize(driver, folder.cleanup)
    source = Path(__file__).parent / "arm_driver.c"
    built = subprocess.run(
        [*find_linker("aarch64"), "-O1", "-o", path, source, "-ldl", "-lpthread"], capture_output=True, text=True
    )
    if built.returncode:
        pytest.fail(f"{built.stderr}\n{NEEDED}", pytrace=False)
    return path


class Emulated:
    """One compiled kernel in a process of its own: `Emulated(kernel, isa)(x, w, y, rows, team=2)`, as `Standalone`."""

    def __init__(self, kernel: Kernel, isa: Isa) -> None:
        self.kernel = kernel
        self._args = kernel.args[:-2]
        self._folder = tempfile.TemporaryDirectory()
        library, self._file = (Path(self._folder.name) / name for name in ("kernel.so", "arguments"))
        module = NativeModule(isa)
        with module.entry("xllm_fn_kernel") as (args, member, team):
            call_with(module, kernel, args, member, team)
            module.barrier(args[len(self._args)], team)
        module.write_shared(library)
        self._process = subprocess.Popen(
            ["qemu-aarch64", "-cpu", PROCESSORS[isa.name], "-L", _ROOT, driver(), library],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        weakref.finalize(self, _end, self._process, self._folder)

    def __call__(self, *values: Any, team: int = 1) -> None:
        """Runs the kernel once; arrays are changed in place."""
        given = completed(self.kernel, values, np.zeros((team, WORDS), np.int64))
        barrier = np.zeros(BARRIER_BYTES, np.uint8)
        head: list[int] = [len(given) + 1]
        places: dict[tuple[int, int], tuple[int, Any]] = {}  # one array given twice is one array
        size = -(-8 * (1 + 2 * head[0]) // 64) * 64
        for value in (*given, barrier):
            if isinstance(value, np.ndarray):
                assert value.flags.c_contiguous
                offset, _ = places.setdefault((value.ctypes.data, value.nbytes), (size, value))
                if offset == size:
                    size += -(-(value.nbytes + _GAP) // 64) * 64
                head += [1, offset]
            else:
                head += [0, value]
        memory = np.full(size, 0xFF, np.uint8)
        memory[: 8 * len(head)] = np.array(head, np.int64).view(np.uint8)
        for offset, value in places.values():
            memory[offset : offset + value.nbytes] = value.reshape(-1).view(np.uint8)
        self._file.write_bytes(memory.tobytes())
        self._send(f"{team} {self._file}\n")
        after = np.frombuffer(self._file.read_bytes(), np.uint8)
        gaps = np.ones(size, bool)
        for offset, value in places.values():
            value.reshape(-1).view(np.uint8)[:] = after[offset : offset + value.nbytes]
            gaps[offset : offset + value.nbytes] = False
        assert (after[gaps] == memory[gaps]).all(), "a kernel wrote past an array"

    def _send(self, line: str) -> None:
        process = self._process
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write(line)
        process.stdin.flush()
        status = process.stdout.readline()
        if not status:
            pytest.fail(f"qemu ended with {process.wait(20)}: {process.stderr.read()}\n{NEEDED}", pytrace=False)
        assert int(status) == 0


def _end(process: subprocess.Popen[str], folder: tempfile.TemporaryDirectory[str]) -> None:
    assert process.stdin and process.stdout and process.stderr
    process.stdin.close()
    process.wait(20)
    process.stdout.close()
    process.stderr.close()
    folder.cleanup()
