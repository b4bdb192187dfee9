"""`lower_cpu`: a planned module and its weights become shared libraries and a weight file. Owns the whole of that way.

Must not know the manifest: `targets/cpu.py` turns the returned facts into its part of one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy.typing as npt

from xllm_compiler.artifact.calls import CallTable
from xllm_compiler.artifact.cpu_isa import machine_isas, machine_levels
from xllm_compiler.dims import Dim, as_dim, sym
from xllm_compiler.errors import XllmError
from xllm_compiler.ir.core import Module
from xllm_compiler.kernels.tir.isa.levels import ISAS
from xllm_compiler.kernels.tir.native.module import NativeModule
from xllm_compiler.kernels.tir.native.objects import OBJECTS, KernelObjects
from xllm_compiler.lowering.barriers import barriers
from xllm_compiler.lowering.cpu.calls import call_table
from xllm_compiler.lowering.cpu.emit import emit_program
from xllm_compiler.lowering.cpu.pack import PackedTensor, plan_file, write_weights
from xllm_compiler.lowering.cpu.select_kernels import select
from xllm_compiler.lowering.cpu.tiles import TileChoices
from xllm_compiler.lowering.kernel_registry import Call
from xllm_compiler.lowering.weights import WeightTable

Progress = Callable[[str, float], None]
PROGRAMS: Final = (("decode", (8 - sym("N"),)), ("prefill", ()))
"""Programs from the most special to the general one, each with the Dims that must be >= 0 for it to run."""


@dataclass(frozen=True, slots=True)
class CpuProgram:
    """One entry point of the libraries."""

    name: str
    guard: tuple[Dim, ...]
    symbol: str
    kernels: int
    barriers: int


@dataclass(frozen=True, slots=True)
class CpuLowering:
    """Everything a manifest says about the CPU programs. `files` are relative to the output directory."""

    isas: tuple[str, ...]
    programs: tuple[CpuProgram, ...]
    calls: CallTable
    weights: tuple[PackedTensor, ...]
    weight_bytes: int
    arena: Dim
    logits: Dim
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
    """Lowers `@step` of a module at stage buf for the CPU: writes `cpu/<isa>.so` and `weights.bin` below `out_dir`.

    `weights`: checkpoint tensors by name, read one at a time. `tiles`: choices of register tiles, made now where they
    are missing, for the best level that this machine can run; None: the kernels' own rule. `objects` compiles kernels,
    or has them. A level that would change nothing for this module is left out. `progress` gets what is being done and
    how much of it is done, 0 to 1. Raises XllmError: "unsupported" for an op without a kernel, "checkpoint" for a bad
    tensor, "io" where nothing can be written or linked.
    """
    if module.stage != "buf":
        raise XllmError("internal", f"lower_cpu needs stage buf, the module is at {module.stage}")
    unknown = [isa for isa in isas if isa not in ISAS]
    if unknown or not isas:
        raise XllmError(
            "option", f"no instruction set level {', '.join(unknown) or '(none given)'}", help=", ".join(ISAS)
        )
    func = module.func("step")
    table = WeightTable()
    selection = select(func, table)
    isas = [isa for isa in isas if not _spared(isa, isas, selection.calls)]
    meet = barriers(selection.calls, selection.storage)
    tensors, size = plan_file(table)
    offsets = {i: t.offset for i, t in enumerate(tensors)}
    programs = tuple(
        CpuProgram(name, guard, f"xllm_step_{name}", len(selection.calls), sum(meet)) for name, guard in PROGRAMS
    )
    try:
        (out_dir / "cpu").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise XllmError("io", f"cannot write code: {error.strerror}", where=str(out_dir / "cpu")) from error
    files = ["weights.bin"]
    calls: dict[str, Sequence[Call]] = dict.fromkeys(isas, selection.calls)
    if tiles is not None:
        for isa in [isa for isa in machine_isas() if isa in isas][-1:]:
            chosen = tiles.apply([call.kernel for call in selection.calls], ISAS[isa], objects, progress)
            calls[isa] = [replace(call, kernel=chosen.get(call.kernel, call.kernel)) for call in selection.calls]
    jobs = [(call.kernel, ISAS[isa]) for isa in isas for call in calls[isa]]
    with objects.compiling(jobs, len(os.sched_getaffinity(0))):
        # Code generation does not wait for the weights, but ends with them: a damaged checkpoint is found in seconds.
        write_weights(table, tensors, size, weights, out_dir / "weights.bin", progress)
        progress("compiling", 0.0)
    for i, isa in enumerate(isas):
        progress(f"linking for {isa}", i / len(isas))
        native = NativeModule(ISAS[isa], objects)
        for program in programs:
            emit_program(native, program.symbol, calls[isa], meet, offsets)
        native.write_shared(out_dir / "cpu" / f"{isa}.so")
        files.append(f"cpu/{isa}.so")
    return CpuLowering(
        isas=tuple(isas),
        programs=programs,
        calls=call_table({name: (selection, meet) for name, _ in PROGRAMS}),
        weights=tuple(tensors),
        weight_bytes=size,
        arena=func.arena if func.arena is not None else as_dim(0),
        logits=selection.storage.output_bytes,
        files=tuple(files),
    )


def _spared(isa: str, isas: Sequence[str], calls: Sequence[Call]) -> bool:
    """Whether all code at a level would be that of another of `isas`, which runs wherever the level does."""
    other = ISAS[isa].without_int8_dot
    return other in isas and not any(call.kernel.int8_dots for call in calls)
