"""`lower_cpu`: a planned module and its weights become shared libraries and a weight file.

All functions share one table of weights, and equal kernels. `targets/cpu.py` writes the returned facts to the manifest.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy.typing as npt

from xllm_compiler.analysis.interface import interface_of, states_of
from xllm_compiler.artifact.calls import CallTable
from xllm_compiler.artifact.cpu_isa import machine_isas, machine_levels
from xllm_compiler.dims import as_dim
from xllm_compiler.errors import XllmError
from xllm_compiler.ir.core import Func, Module
from xllm_compiler.kernels.tir.codegen.kernel import TILE_TOKENS, Kernel
from xllm_compiler.kernels.tir.isa.levels import ISAS
from xllm_compiler.kernels.tir.native.module import NativeModule
from xllm_compiler.kernels.tir.native.objects import OBJECTS, KernelObjects
from xllm_compiler.lowering.barriers import barriers
from xllm_compiler.lowering.cpu.call_table import call_table
from xllm_compiler.lowering.cpu.emit import emit_program
from xllm_compiler.lowering.cpu.pack import PackedTensor, plan_file, write_weights
from xllm_compiler.lowering.cpu.select_kernels import select
from xllm_compiler.lowering.cpu.tile_search import TileChoices
from xllm_compiler.lowering.kernel_registry import Call
from xllm_compiler.lowering.weight_requests import WeightTable
from xllm_compiler.step.abi import ArgumentBlock, symbol_of
from xllm_compiler.step.interface import Function, Program, State

Progress = Callable[[str, float], None]
KV_LAYOUT: Final = f"tile{TILE_TOKENS}"
"""The name of the layout of KV pages: K and V of so many tokens in vectors (docs/cpu-program.md)."""


@dataclass(frozen=True, slots=True)
class CpuLowering:
    """Everything a manifest says about the CPU programs. `files` are relative to the output directory."""

    isas: tuple[str, ...]
    functions: dict[str, Function]
    states: dict[str, State]
    calls: CallTable
    weights: tuple[PackedTensor, ...]
    weight_bytes: int
    files: tuple[str, ...]


def lower_cpu(
    module: Module,
    weights: Mapping[str, npt.NDArray[Any]],
    out_dir: Path,
    *,
    isas: Sequence[str] = machine_levels(),
    tiles: TileChoices | None = None,
    objects: KernelObjects = OBJECTS,
    progress: Progress = lambda what, done: None,
) -> CpuLowering:
    """Lowers all functions of a module at stage buf for the CPU: writes `cpu/<isa>.so`, `weights.bin` into `out_dir`.

    `weights`: checkpoint tensors by name, read one at a time.
    `tiles`: choices of register tiles for the best level that this machine can run. Missing ones are searched for now.
    None: the kernels' own rule.
    `objects`: compiles kernels, and keeps those that it has compiled.
    `progress`: called with what is being done, and how much of it is done, 0 to 1.

    A level whose code would be that of another level is left out. Raises XllmError: "unsupported" for an op without a
    kernel, "checkpoint" for a bad tensor, "io" where nothing can be written or linked.
    """
    if module.stage != "buf":
        raise XllmError("internal", f"lower_cpu needs stage buf, the module is at {module.stage}")
    unknown = [isa for isa in isas if isa not in ISAS]
    if unknown or not isas:
        raise XllmError(
            "option", f"no instruction set level {', '.join(unknown) or '(none given)'}", help=", ".join(ISAS)
        )
    states = states_of(module, KV_LAYOUT)
    table = WeightTable()
    selections = {name: select(func, table) for name, func in module.funcs.items()}
    isas = [isa for isa in isas if not _is_redundant(isa, isas, [c for s in selections.values() for c in s.calls])]
    waits = {name: barriers(selection.calls, selection.storage) for name, selection in selections.items()}
    functions = {name: _function(func) for name, func in module.funcs.items()}
    blocks = {name: ArgumentBlock.of(function, module.scope.symbols) for name, function in functions.items()}
    tensors, size = plan_file(table)
    offsets = {i: t.offset for i, t in enumerate(tensors)}
    try:
        (out_dir / "cpu").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise XllmError("io", f"cannot write code: {error.strerror}", where=str(out_dir / "cpu")) from error
    files = ["weights.bin"]
    kernels = [call.kernel for selection in selections.values() for call in selection.calls]
    chosen: dict[str, Mapping[Kernel, Kernel]] = {isa: {} for isa in isas}
    if tiles is not None:
        for isa in [isa for isa in machine_isas() if isa in isas][-1:]:
            chosen[isa] = tiles.apply(kernels, ISAS[isa], objects, progress)
    jobs = [(chosen[isa].get(kernel, kernel), ISAS[isa]) for isa in isas for kernel in kernels]
    with objects.compiling(jobs, len(os.sched_getaffinity(0))):
        # Kernels compile in other processes meanwhile. A bad tensor ends this at once, so it is found in seconds.
        write_weights(table, tensors, size, weights, out_dir / "weights.bin", progress)
        progress("compiling", 0.0)
    for i, isa in enumerate(isas):
        progress(f"linking for {isa}", i / len(isas))
        native = NativeModule(ISAS[isa], objects)
        for name, selection in selections.items():
            (program,) = functions[name].programs
            calls = [replace(call, kernel=chosen[isa].get(call.kernel, call.kernel)) for call in selection.calls]
            emit_program(native, program.symbol, functions[name], blocks[name], calls, waits[name], offsets)
        native.write_shared(out_dir / "cpu" / f"{isa}.so")
        files.append(f"cpu/{isa}.so")
    return CpuLowering(
        isas=tuple(isas),
        functions=functions,
        states=states,
        calls=call_table({symbol_of(name): (s, waits[name]) for name, s in selections.items()}),
        weights=tuple(tensors),
        weight_bytes=size,
        files=tuple(files),
    )


def _function(func: Func) -> Function:
    """The interface of `func`, with its one program, which runs calls of any size."""
    arena = str(func.arena if func.arena is not None else as_dim(0))
    return replace(interface_of(func), programs=(Program(symbol_of(func.name), (), arena),))


def _is_redundant(isa: str, isas: Sequence[str], calls: Sequence[Call]) -> bool:
    """Whether all code at a level would be that of another of `isas`, which runs wherever the level does."""
    other = ISAS[isa].without_int8_dot
    return other in isas and not any(call.kernel.int8_dots for call in calls)
