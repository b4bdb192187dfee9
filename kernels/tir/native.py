"""From TensorIR functions to a shared library with a plain C interface: `NativeModule`.

Owns the pass pipeline, code generation and linking. Must not know any kernel or the IR.

TVM's own pipeline would wrap every function in its packed calling convention and route allocations through its runtime.
Ours keeps plain functions: no TVM runtime is needed to load the result, and allocations are plain stack slots.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tvm
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.build import codegen_build
from tvm.tirx.script.builder import ir as T

from xllm_compiler.errors import XllmError
from xllm_compiler.kernels.tir.base import Isa, Kernel
from xllm_compiler.kernels.tir.linker import find_linker
from xllm_compiler.kernels.tir.team import team_llvm

_C_CALL = 1  # TVM's "kCPackedFunc": such a function keeps the signature it has and is exported under its own name


class NativeModule:
    """Collects kernels and entry functions for one instruction set level and writes them as one shared library."""

    def __init__(self, isa: Isa) -> None:
        self.isa = isa
        self._kernels: dict[str, tuple[Kernel, Any]] = {}
        self._functions: dict[Any, Any] = {}

    def call(self, kernel: Kernel, args: Sequence[Any], member: Any, team: Any) -> None:
        """Emits a call of `kernel` at the builder's current place.

        `args` has one expression per argument of `kernel.args` but the last two: a handle or an int64 address for a
        pointer, an int32 for a size.
        """
        declared = kernel.args[:-2]
        if len(args) != len(declared):
            raise XllmError(
                "internal", f"{kernel.symbol} takes {len(declared)} arguments and team, got {len(args)}", where="call"
            )
        values = [_as_argument(value, arg.pointer) for value, arg in zip(args, declared, strict=True)]
        T.evaluate(tvm.ir.Call(self._declare(kernel), [*values, member, team], ret_ty=tvm.ir.TupleType([])))

    def barrier(self, pointer: Any, team: Any) -> None:
        """Emits the team's barrier: no member goes on before all have come here. `pointer`: 64 zeroed bytes."""
        T.evaluate(T.call_extern("int32", "xllm_team_barrier", _as_argument(pointer, True), team))

    def stamp(self, pointer: Any, index: Any) -> None:
        """Emits a time stamp: the counter goes to the int64 `pointer[index]`; nothing happens where `pointer` is 0."""
        T.evaluate(T.call_extern("int32", "xllm_team_stamp", _as_argument(pointer, True), index))

    @contextmanager
    def entry(self, symbol: str) -> Iterator[tuple[Any, Any, Any]]:
        """Defines `int32_t symbol(const int64_t *args, int32_t member, int32_t team)`; the body is what is emitted
        inside, and then it returns 0. Yields (args as an int64 buffer, member, team)."""
        with IRBuilder() as builder, T.prim_func():
            T.func_name(symbol)
            pointer = T.arg("args", T.handle("int64"))
            member = T.arg("member", T.int32())
            team = T.arg("team", T.int32())
            T.func_ret(tvm.ir.PrimType("int32"))
            T.func_attr({"calling_conv": _C_CALL, "global_symbol": symbol})
            buffer = T.decl_buffer((1 << 16,), "int64", data=pointer)
            yield buffer, member, team
            T.Return(T.int32(0))
        self._functions[tvm.ir.GlobalVar(symbol)] = builder.get()

    def _declare(self, kernel: Kernel) -> Any:
        known = self._kernels.get(kernel.symbol)
        if known is None:
            # Built later, outside the caller's builder frames.
            known = self._kernels[kernel.symbol] = (kernel, tvm.ir.GlobalVar(kernel.symbol))
        elif known[0] != kernel:
            raise XllmError("internal", f"two different kernels share the symbol {kernel.symbol}", where="call")
        return known[1]

    def lowered(self) -> Any:
        """The module as TVM's code generator takes it."""
        functions = dict(self._functions)
        for kernel, variable in self._kernels.values():
            functions[variable] = kernel.build(self.isa)
        module = tvm.IRModule(functions)
        target = tvm.target.Target(self.isa.target())
        # Kernels use flat buffers only, and LLVM simplifies. TVM's simplifier takes minutes over an unrolled tile; its
        # FlattenBuffer leaves vector indices as sums, which the code generator then takes apart lane by lane.
        for transform in (tirx.transform.BindTarget(target.with_host(target)), tirx.transform.LowerIntrin()):
            module = transform(module)
        return module

    def write_object(self, path: Path) -> None:
        """Writes an ELF object whose only global symbols are the entry functions; it calls the team's barrier."""
        target = tvm.target.Target(self.isa.target())
        codegen_build(self.lowered(), target).write_to_file(str(path))

    def write_shared(self, path: Path) -> None:
        """Writes a stripped shared library that needs no other library but libm, the team runtime included.

        Raises XllmError("io") without a linker for the level's architecture.
        """
        linker = find_linker(self.isa.machine)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            self.write_object(folder / "step.o")
            _write_team_object(folder, self.isa)
            (folder / "exports").write_text("{ global: xllm_step_*; xllm_team_*; local: *; };")
            command = [
                *linker,
                "-shared",
                "-nostdlib",
                "-Wl,--build-id=none",
                "-Wl,-z,noexecstack",
                "-Wl,-z,defs",
                "-s",
            ]
            # Relative names in a fixed order: nothing of this machine or this run goes into the library.
            command += ["-Wl,--version-script=exports", "-o", os.fspath(path.resolve()), "step.o", "team.o"]
            command += [
                "-Wl,--as-needed",
                "-lm",
            ]  # rare functions only (pow, sin, ...): the kernels of the spine need none
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            if done.returncode:
                raise XllmError("internal", f"linking failed: {done.stderr.strip()}", where=os.fspath(path))


def _write_team_object(folder: Path, isa: Isa) -> None:
    target = json.dumps({key: isa.target()[key] for key in ("kind", "mtriple", "mcpu", "mattr")}).replace('"', "\\22")
    text = f'target triple = "{isa.target()["mtriple"]}"\n{team_llvm(isa.machine)}\n'
    text += f'!llvm.module.flags = !{{!0}}\n!0 = !{{i32 2, !"tvm_target", !"{target}"}}\n'
    (folder / "team.ll").write_text(text)
    load = tvm.get_global_func("ffi.Module.load_from_file.ll")
    load(str(folder / "team.ll"), "ll").write_to_file(str(folder / "team.o"))


def _as_argument(value: Any, pointer: bool) -> Any:
    if isinstance(value, int):
        return T.int32(value)
    if pointer and str(value.ty) == "int64":
        return T.reinterpret("handle", value)
    return value
