"""The CPU target's half of the runtime: which levels this machine has, and the library of one as code.

Here is also what the CPU's part of a manifest must obey.
"""

from __future__ import annotations

import ctypes

import numpy as np
from numpy.typing import NDArray

from xllm_compiler.artifact import CALLS, Manifest
from xllm_compiler.artifact.cpu_isa import choose_isa, machine_isas
from xllm_compiler.artifact.decode import bad
from xllm_compiler.runtime.cpu.executor import CpuExecutor
from xllm_compiler.runtime.cpu.team import load_library, native_function
from xllm_compiler.runtime.targets import Files, RuntimeTarget


class CpuCode:
    """The shared library of one level."""

    def __init__(self, library: ctypes.CDLL, manifest: Manifest) -> None:
        """Raises kind "artifact" where the library lacks the function of a program."""
        self.shared_library = library
        self._manifest = manifest
        for function in manifest.functions.values():
            for program in function.programs:
                native_function(library, program.symbol)

    def executor(self, weights: NDArray[np.uint8], *, pages: int, threads: int) -> CpuExecutor:
        """The programs on a team of `threads` threads."""
        return CpuExecutor(self._manifest, self.shared_library, weights, pages=pages, threads=threads)


class CpuRuntime(RuntimeTarget):
    """A level is an instruction set, and has one library."""

    def check(self, manifest: Manifest) -> None:
        for name in (CALLS, *(name for isa in manifest.target.levels for name in self.reads(isa))):
            if name not in manifest.target.files:
                raise bad("$.target.files", f"{name} is not listed")

    def levels(self, manifest: Manifest) -> tuple[str, ...]:
        here = tuple(isa for isa in machine_isas() if isa in manifest.target.levels)
        return here or (choose_isa(manifest.target.levels),)  # says what is lacking

    def reads(self, level: str) -> tuple[str, ...]:
        return (f"cpu/{level}.so",)

    def load(self, files: Files, manifest: Manifest, level: str) -> CpuCode:
        (name,) = self.reads(level)
        return CpuCode(load_library(files / name), manifest)
