"""`NativeModule`: entry functions and kernels, linked into a shared library with a plain C interface.

TVM's own pipeline would give every function its packed calling convention, and allocate through its runtime. Here
functions stay plain and allocations are stack slots, so the library needs no TVM runtime. objects.py compiles kernels.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import tvm
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from xllm_compiler.errors import XllmError
from xllm_compiler.kernels.tir.codegen.kernel import Kernel
from xllm_compiler.kernels.tir.isa.levels import Isa
from xllm_compiler.kernels.tir.native.linker import find_linker
from xllm_compiler.kernels.tir.native.objects import C_CALL, OBJECTS, KernelObjects, make_object, object_of
from xllm_compiler.kernels.tir.native.team import team_llvm
from xllm_compiler.step.abi import SYMBOL_PREFIX


class NativeModule:
    """Collects kernels and entry functions for one instruction set level and writes them as one shared library."""

    def __init__(self, isa: Isa, objects: KernelObjects = OBJECTS) -> None:
        """`objects`: compiles kernels, and keeps those that it has compiled."""
        self.isa = isa
        self._objects = objects
        self._kernels: dict[str, Kernel] = {}
        self._functions: dict[Any, Any] = {}

    def call(self, kernel: Kernel, args: Sequence[Any], member: Any, team: Any) -> None:
        """Emits a call of `kernel` at the builder's current place.

        `args`: one expression for each argument of `kernel.args` but the last two: a handle or an int64 address for a
        pointer, an int32 for a size.
        """
        declared = kernel.args[:-2]
        if len(args) != len(declared):
            raise XllmError(
                "internal", f"{kernel.symbol} takes {len(declared)} arguments and team, got {len(args)}", where="call"
            )
        values = [_as_argument(value, arg.pointer) for value, arg in zip(args, declared, strict=True)]
        known = self._kernels.setdefault(kernel.symbol, kernel)
        if known != kernel:
            raise XllmError("internal", f"two different kernels share the symbol {kernel.symbol}", where="call")
        T.evaluate(T.call_extern("void", kernel.symbol, *values, member, team))

    def barrier(self, pointer: Any, team: Any) -> None:
        """Emits the team's barrier: no member continues before all have arrived. `pointer`: 64 zeroed bytes."""
        T.evaluate(T.call_extern("int32", "xllm_team_barrier", _as_argument(pointer, True), team))

    def stamp(self, pointer: Any, index: Any) -> None:
        """Emits a time stamp: writes the counter to the int64 `pointer[index]`, or nothing where `pointer` is 0."""
        T.evaluate(T.call_extern("int32", "xllm_team_stamp", _as_argument(pointer, True), index))

    @contextmanager
    def entry(self, symbol: str) -> Iterator[tuple[Any, Any, Any]]:
        """Defines `int32_t symbol(const int64_t *args, int32_t member, int32_t team)`. What is emitted in the context
        is its body; then it returns 0. Yields (args as an int64 buffer, member, team)."""
        with IRBuilder() as builder, T.prim_func():
            T.func_name(symbol)
            pointer = T.arg("args", T.handle("int64"))
            member = T.arg("member", T.int32())
            team = T.arg("team", T.int32())
            T.func_ret(tvm.ir.PrimType("int32"))
            T.func_attr({"calling_conv": C_CALL, "global_symbol": symbol})
            buffer = T.decl_buffer((1 << 16,), "int64", data=pointer)
            yield buffer, member, team
            T.Return(T.int32(0))
        self._functions[tvm.ir.GlobalVar(symbol)] = builder.get()

    def write_shared(self, path: Path) -> None:
        """Writes a stripped shared library, the team runtime included. It needs no library but libm.

        Raises XllmError("io") if there is no linker for the level's architecture.
        """
        linker = find_linker(self.isa.machine)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "step.o").write_bytes(make_object(self._functions, self.isa))
            (folder / "team.o").write_bytes(_team_object(self.isa))
            objects = ["step.o", "team.o"]
            for i, kernel in enumerate(self._kernels.values()):
                objects.append(f"{i}.o")
                (folder / objects[-1]).write_bytes(self._objects.get(kernel, self.isa))
            (folder / "exports").write_text(f"{{ global: {SYMBOL_PREFIX}*; xllm_team_*; local: *; }};")
            command = [
                *linker,
                "-shared",
                "-nostdlib",
                "-Wl,--build-id=none",
                "-Wl,-z,noexecstack",
                "-Wl,-z,defs",
                "-s",
            ]
            # Relative names in a fixed order, so that nothing of this machine or this run gets into the library.
            command += ["-Wl,--version-script=exports", "-o", os.fspath(path.resolve()), *objects]
            # For rare functions only (pow, sin, ...): most models need none of them.
            command += ["-Wl,--as-needed", "-lm"]
            english = {**os.environ, "LC_ALL": "C"}
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=english)
            if done.returncode:
                if "No space left on device" in done.stderr:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(path))
                raise XllmError("internal", f"linking failed: {done.stderr.strip()}", where=os.fspath(path))


@lru_cache
def _team_object(isa: Isa) -> bytes:
    target = json.dumps({key: isa.target()[key] for key in ("kind", "mtriple", "mcpu", "mattr")}).replace('"', "\\22")
    text = f'target triple = "{isa.target()["mtriple"]}"\n{team_llvm(isa.machine)}\n'
    text += f'!llvm.module.flags = !{{!0}}\n!0 = !{{i32 2, !"tvm_target", !"{target}"}}\n'
    load = tvm.get_global_func("ffi.Module.load_from_file.ll")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "team.ll"
        source.write_text(text)
        return object_of(load(str(source), "ll"))


def _as_argument(value: Any, pointer: bool) -> Any:
    if isinstance(value, int):
        return T.int32(value)
    if pointer and str(value.ty) == "int64":
        return T.reinterpret("handle", value)
    return value
