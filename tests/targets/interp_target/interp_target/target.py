"""The compiler's half: the module as text, and its parameters one after the other in weights.bin."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy.typing as npt

from xllm_compiler.analysis.interface import interface_of, states_of
from xllm_compiler.analysis.machine import Machine
from xllm_compiler.artifact import WEIGHTS, Weight
from xllm_compiler.errors import XllmError
from xllm_compiler.ir.core import Module
from xllm_compiler.ir.ops import Param
from xllm_compiler.ir.printer import print_module
from xllm_compiler.passes.base import Capabilities
from xllm_compiler.passes.pipelines import Halves
from xllm_compiler.progress import Progress
from xllm_compiler.step.abi import symbol_of
from xllm_compiler.step.interface import Program
from xllm_compiler.targets import Lowered, Target

MODULE = "interp/module.xir"
PIPELINES = Halves(
    before=("import-clean", "fold", "cse", "canonicalise", "fix(fold,cse,dce,canonicalise)"),
    after=("fuse-kv-append", "dce"),
)


@dataclass(frozen=True)
class Interp(Target):
    """`align`: bytes to which tensors in weights.bin are aligned; an option so that there is one."""

    align: int = 64

    name = "interp"
    capabilities = Capabilities(memories=("host",), streams=1, collectives=frozenset())
    machine = Machine("interp", flops=1e9, bandwidth=1e9, launch=1e-5)
    pipelines = PIPELINES
    presets: ClassVar = {"interp": PIPELINES.plain()}

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--align", type=int, default=64, metavar="BYTES", help="of tensors in weights.bin")

    @classmethod
    def of_arguments(cls, args: argparse.Namespace) -> Self:
        return cls(args.align)

    def resolved(self) -> Self:
        if self.align < 64 or self.align & (self.align - 1):
            raise XllmError("option", f"--align {self.align} is not 64, 128, 256 and so on")
        return self

    def lower(
        self,
        module: Module,
        weights: Mapping[str, npt.NDArray[Any]],
        out: Path,
        *,
        store: Path | None,
        progress: Progress,
    ) -> Lowered:
        names = sorted({op.name_ for f in module.funcs.values() for op in f.ops if isinstance(op, Param)})
        table: list[Weight] = []
        with (out / WEIGHTS).open("wb") as file:
            for i, name in enumerate(names):
                progress.advance("weights", i / len(names))
                array = weights[name]
                file.write(bytes(-file.tell() % self.align))
                table.append(Weight(name, "row", _dtype(array), array.shape, file.tell(), array.nbytes))
                file.write(array.tobytes())
            size = file.tell()
        (out / MODULE).parent.mkdir()
        (out / MODULE).write_text(print_module(module), encoding="utf-8")
        return Lowered(
            levels=("numpy",),
            files=(MODULE,),
            functions={
                name: replace(interface_of(func), programs=(Program(symbol_of(name), (), "0"),))
                for name, func in module.funcs.items()
            },
            states=states_of(module, "numpy"),
            weights=tuple(table),
            weight_bytes=size,
        )


def _dtype(array: npt.NDArray[Any]) -> str:
    return {"float32": "f32", "bfloat16": "bf16", "int32": "i32", "uint8": "u8", "bool": "bool"}[array.dtype.name]
