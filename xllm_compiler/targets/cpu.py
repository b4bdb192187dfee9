"""The CPU target: kernels made by TVM for each instruction set level, linked into one shared library a level.

Owns its options and how the facts of the lowering become those of a manifest; the lowering is `lowering/cpu`, the
kernels are `kernels/tir`, the runtime's half is `runtime/cpu`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Self

from xllm_compiler import kernels, weight_formats
from xllm_compiler.analysis.machine import Machine
from xllm_compiler.artifact import CALLS, Weight
from xllm_compiler.artifact.cpu_isa import LEVELS, machine_levels, machine_name
from xllm_compiler.errors import XllmError
from xllm_compiler.ir.core import Module
from xllm_compiler.passes.base import Capabilities
from xllm_compiler.passes.pipelines import AFTER, BEFORE, Halves
from xllm_compiler.passes.quantize.forms import QuantForm, parse_form
from xllm_compiler.progress import Progress
from xllm_compiler.sources import digest_sources
from xllm_compiler.targets.base import Lowered, Target

if TYPE_CHECKING:
    import numpy.typing as npt

PIPELINES: Final = Halves(BEFORE, AFTER)


@dataclass(frozen=True)
class Cpu(Target):
    """`isas`: instruction set levels to make code for; None: all of this machine's architecture. `tune`: choose the
    register tiles of linear layers by trying them on this machine."""

    isas: tuple[str, ...] | None = None
    tune: bool = False

    name = "cpu"
    capabilities = Capabilities(align=64, memories=("host",), streams=1, collectives=frozenset())
    # Two cores of a virtual AMD EPYC (Zen 4) with the bf16 dot product, measured by bench/limits.py; launch: a barrier.
    machine = Machine("cpu", flops=448e9, bandwidth=34.2e9, launch=0.2e-6, link=1.25e9, hop=20e-6)
    pipelines = PIPELINES
    presets: ClassVar = {
        "cpu": PIPELINES.plain(),
        "cpu-rows": PIPELINES.plain("quantize-rows"),  # checkpoints whose weights come quantized, for rounded inputs
        "cpu-int8": PIPELINES.quantized(parse_form("int8")),
        "cpu-int4": PIPELINES.quantized(parse_form("int4")),
    }
    requires: ClassVar = {"tvm": "apache-tvm"}

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--isas",
            metavar="LIST",
            help="instruction sets to make code for; default all of this machine's architecture: "
            "avx2,avx_vnni,avx512,avx512_vnni,avx512_bf16,amx or neon,neon_bf16",
        )
        parser.add_argument(
            "--tune",
            action="store_true",
            help="choose the register tiles of linear layers by trying a few on this machine, for which it should be "
            "idle; what was once chosen for a processor stays. Answers do not change by a bit",
        )

    @classmethod
    def of_arguments(cls, args: argparse.Namespace) -> Self:
        isas = None if args.isas is None else tuple(isa for isa in args.isas.split(",") if isa)
        return cls(isas, args.tune)

    @property
    def needs_store(self) -> bool:
        return self.tune  # what was chosen must be remembered

    def resolved(self) -> Self:
        isas = machine_levels() if self.isas is None else self.isas
        known = ", ".join(LEVELS)
        for isa in isas:
            if isa not in LEVELS:
                raise XllmError("option", f"--isas {isa!r} is not known", help=f"choose from {known}")
        if not isas:
            raise XllmError("option", "--isas is empty", help=f"name some of {known}")
        return replace(self, isas=tuple(isa for isa in LEVELS if isa in isas))

    def factors(self) -> dict[str, Any]:
        """Tuning is for one processor, so its name is what counts."""
        return {"isas": None if self.isas is None else list(self.isas), "tune": machine_name() if self.tune else None}

    def quantized(self, form: QuantForm, wide: Sequence[str] = ()) -> tuple[str, ...]:
        return self.pipelines.quantized(form, wide)

    def load(self) -> None:
        import xllm_compiler.lowering.cpu.build  # noqa: F401

    def lower(
        self,
        module: Module,
        weights: Mapping[str, npt.NDArray[Any]],
        out: Path,
        *,
        store: Path | None,
        progress: Progress,
    ) -> Lowered:
        from xllm_compiler.kernels.tir.native.objects import OBJECTS, KernelObjects
        from xllm_compiler.kernels.tir.native.store import ObjectStore
        from xllm_compiler.lowering.cpu.build import lower_cpu
        from xllm_compiler.lowering.cpu.tile_search import TileChoices

        tiles = None
        if self.tune:
            if store is None:
                raise XllmError("option", "tuning without a place to remember what was chosen")
            folders = Path(next(iter(kernels.__path__))), Path(weight_formats.__file__)
            digests = " ".join(map(digest_sources, folders))
            tiles = TileChoices(store / "tiles.json", f"{machine_name()}; kernels {digests}")
        objects = OBJECTS if store is None else KernelObjects(ObjectStore(store / "kernels"))
        isas = machine_levels() if self.isas is None else self.isas
        done = lower_cpu(module, weights, out, isas=isas, tiles=tiles, objects=objects, progress=progress.advance)
        if objects.store is not None and objects.store.failures:
            progress.note(f"some compiled kernels could not be kept or found: {objects.store.last_failure}")
        (out / CALLS).write_text(done.calls.to_json(), encoding="utf-8", newline="")
        return Lowered(
            levels=done.isas,
            files=(CALLS, *(f"cpu/{isa}.so" for isa in done.isas)),
            functions=done.functions,
            states=done.states,
            weights=tuple(Weight(t.name, t.layout, t.dtype, t.shape, t.offset, t.bytes) for t in done.weights),
            weight_bytes=done.weight_bytes,
        )
