"""What a pass is and what it is given. Owns Pass, PassContext, Target and Remark; must not know any single pass.

A pass is a frozen dataclass: its fields are its options, so they are typed, defaulted, hashable and printable.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

from xllm_compiler.ir.core import Func, Module, Op, Stage


@dataclass(frozen=True, slots=True)
class Target:
    """What passes may know of the machine. `align`: bytes to which every buffer in the arena is aligned."""

    kind: str = "cpu"
    align: int = 64


@dataclass(frozen=True, slots=True)
class Remark:
    """Something a reader of the result should know: mostly an opportunity that was not taken, and why."""

    pass_name: str
    where: str
    text: str

    def __str__(self) -> str:
        return f"{self.pass_name}: {self.text} [{self.where}]"


@dataclass(slots=True)
class PassContext:
    """Handed to every pass: facts about the target, and where to leave counts and remarks.

    The manager sets `current` to the running pass's name.
    """

    target: Target = field(default_factory=Target)
    current: str = ""
    stats: dict[str, dict[str, int]] = field(default_factory=dict)
    remarks: list[Remark] = field(default_factory=list)

    def stat(self, name: str, n: int = 1) -> None:
        """Adds `n` to the running pass's counter `name`."""
        counters = self.stats.setdefault(self.current, {})
        counters[name] = counters.get(name, 0) + n

    def remark(self, op: Op | None, text: str) -> None:
        """Leaves a remark about `op` (None: about the module)."""
        remark = Remark(self.current, describe(op), text)
        if remark not in self.remarks[-64:]:  # fix(...) rounds see the same op again
            self.remarks.append(remark)


def describe(op: Op | None) -> str:
    """Where an op is, for people: its results, name, and the model's source line when known."""
    if op is None:
        return "module"
    results = ", ".join(f"%{r.name}" for r in op.results)
    traced = op.loc.describe()
    text = f"{results} = {op.name}" if results else op.name
    return f"{text}, {traced}" if traced else text


@dataclass(frozen=True)
class Pass(ABC):
    """One step of a pipeline. Subclasses are frozen dataclasses registered with `@register_pass(name)`.

    `run` changes the module in place and returns whether it changed anything; the manager compares the claim with the
    module's structural hash. `needs` is the stage a pass accepts, `leaves` the one the module is in afterwards.
    """

    name: ClassVar[str]
    needs: ClassVar[Stage] = "graph"
    leaves: ClassVar[Stage] = "graph"

    @abstractmethod
    def run(self, module: Module, ctx: PassContext) -> bool:
        """Changes `module`; True when it did."""


@dataclass(frozen=True)
class FuncPass(Pass):
    """A pass that treats every function by itself."""

    def run(self, module: Module, ctx: PassContext) -> bool:
        changed = False
        for func in module.funcs.values():
            changed |= self.run_on(func, ctx)
        return changed

    @abstractmethod
    def run_on(self, func: Func, ctx: PassContext) -> bool:
        """Changes `func`; True when it did."""
