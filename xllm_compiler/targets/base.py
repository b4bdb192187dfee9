"""What a target is to the compiler: its name, options, passes and capabilities, and how it lowers a module.

The runtime's half is `runtime/targets.py`. A target must not know the driver or any other target.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from xllm_compiler.analysis.machine import Machine
from xllm_compiler.artifact import Weight
from xllm_compiler.errors import XllmError
from xllm_compiler.ir.core import Module
from xllm_compiler.passes.base import Capabilities
from xllm_compiler.passes.pipelines import Halves
from xllm_compiler.passes.presets import HasPresets
from xllm_compiler.passes.quantize.forms import QuantForm
from xllm_compiler.progress import Progress

if TYPE_CHECKING:
    import numpy.typing as npt

    from xllm_compiler.step.interface import Function, State


@dataclass(frozen=True, slots=True)
class Lowered:
    """What a manifest says of a target's code.

    `levels`: the machines that there is code for, from the widest spread to the best, in words of the target's own.
    `files`: those that its runtime reads, relative to the artifact, besides module.xir and weights.bin. `functions` and
    `states` by name. `weights`: what lies where in the `weight_bytes` of weights.bin."""

    levels: tuple[str, ...]
    files: tuple[str, ...]
    functions: dict[str, Function]
    states: dict[str, State]
    weights: tuple[Weight, ...]
    weight_bytes: int


class Target(HasPresets, ABC):
    """One target. A subclass is a frozen dataclass: its fields are its options, each with a default.

    `requires`: modules that lowering imports, each with the distribution that has it, whose version enters the key of
    the compile cache. `pipelines`: its passes in two halves. `presets`: pipelines by name; one of them has the target's
    own name, the others begin with that and a hyphen. `machine`: limits of a typical one, for reports."""

    name: ClassVar[str]
    capabilities: ClassVar[Capabilities]
    machine: ClassVar[Machine]
    pipelines: ClassVar[Halves]
    requires: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add the flags of `xllm-compile` for its options, if it has any."""

    @classmethod
    def of_arguments(cls, args: argparse.Namespace) -> Self:
        """The target with the options that the flags ask for."""
        return cls()

    @property
    def needs_store(self) -> bool:
        """Whether `lower` cannot do without a store."""
        return False

    def resolved(self) -> Self:
        """The same with every default filled in. Raises kind "option" for what cannot be."""
        return self

    def factors(self) -> dict[str, Any]:
        """By field name, the JSON value of each option: what of it decides the result. It enters the cache's key."""
        assert dataclasses.is_dataclass(self)
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def sources(cls) -> Path | None:
        """The file or folder whose Python sources decide what it makes; None for a target of ours, whose sources are in
        every key anyway. By default the package that the class is in."""
        package = cls.__module__.partition(".")[0]
        file = sys.modules[package].__file__ or sys.modules[cls.__module__].__file__
        if package == "xllm_compiler" or file is None:
            return None
        return Path(file).parent if Path(file).name == "__init__.py" else Path(file)

    def pipeline(self, rows: bool) -> str:
        """The pipeline of who asks for none. `rows`: the checkpoint was made for inputs that are rounded by row."""
        return f"@{self.name}-rows" if rows and f"{self.name}-rows" in self.presets else f"@{self.name}"

    def quantized(self, form: QuantForm, wide: Sequence[str] = ()) -> tuple[str, ...]:
        """The passes that make a form of --quantize, as `Halves.quantized`. By default it raises kind "option": the
        target has no such layers."""
        raise XllmError("option", f"--quantize {form}: target {self.name} has no quantized layers")

    def load(self) -> None:
        """Import what `lower` needs. A phase of its own, since it may take seconds."""

    @abstractmethod
    def lower(
        self,
        module: Module,
        weights: Mapping[str, npt.NDArray[Any]],
        out: Path,
        *,
        store: Path | None,
        progress: Progress,
    ) -> Lowered:
        """Write weights.bin and the target's own files below `out`, and say what the manifest must.

        `module`: what the target's passes left. `weights`: checkpoint tensors by name, read one at a time. `store`: a
        directory for what the next compile can use again; None: nothing is kept. Raises XllmError, kind "unsupported"
        for an op that the target cannot run."""


def check_capabilities(module: Module, target: Target) -> None:
    """Raises kind "unsupported" where the module starts a collective or uses a stream that the target does not have."""
    from xllm_compiler.ir.ops import Collective  # with numpy, which `--help` should not wait for

    can = target.capabilities
    for func in module.funcs.values():
        for op in func.ops:
            if isinstance(op, Collective) and can.collectives is not None and op.name not in can.collectives:
                raise XllmError("unsupported", f"target {target.name} has no {op.name}", where=op.loc.describe())
            if can.streams is not None and op.stream >= can.streams:
                raise XllmError(
                    "unsupported",
                    f"{op.name} stands on stream {op.stream}, and target {target.name} has {can.streams}",
                    where=op.loc.describe(),
                )
