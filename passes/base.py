"""What a pass is and what it is given. Owns Pass, PassContext, Capabilities and Remark; must not know any single pass.

A pass is a frozen dataclass: its fields are its options, so they are typed, defaulted, hashable and printable.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from xllm_compiler.errors import XllmError
from xllm_compiler.ir.core import Func, Module, Op, Stage
from xllm_compiler.ir.loc import UNKNOWN, Loc
from xllm_compiler.ir.rewrite import RewriteListener


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What passes may know of a target. `align`: bytes to which every buffer in the arena is aligned. `memories`: kinds
    of memory, the arena's first. `streams`: how many can run at once. `collectives`: names of the ops that it can start
    ("comm.all_reduce_start"); None: whatever there is, where no target is meant."""

    align: int = 64
    memories: tuple[str, ...] = ("host",)
    streams: int | None = None
    collectives: frozenset[str] | None = None


@dataclass(frozen=True, slots=True)
class Remark:
    """Something a reader of the result should know: mostly an opportunity that was not taken, and why.

    `where` is for people; `loc` is where the op came from.
    """

    pass_name: str
    where: str
    text: str
    loc: Loc = UNKNOWN

    def __str__(self) -> str:
        return f"{self.pass_name}: {self.text} [{self.where}]"


@dataclass(slots=True)
class PassContext:
    """Handed to every pass: what the target can do, and where to leave counts and remarks.

    The manager sets `current` to the running pass's name. `rewrites` counts every rewrite of every pass that asks.
    """

    target: Capabilities = field(default_factory=Capabilities)
    current: str = ""
    stats: dict[str, dict[str, int]] = field(default_factory=dict)
    remarks: list[Remark] = field(default_factory=list)
    listeners: list[RewriteListener] = field(default_factory=list)
    rewrites: int = 0

    def stat(self, name: str, n: int = 1) -> None:
        """Adds `n` to the running pass's counter `name`."""
        counters = self.stats.setdefault(self.current, {})
        counters[name] = counters.get(name, 0) + n

    def remark(self, op: Op | None, text: str) -> None:
        """Leaves a remark about `op` (None: about the module)."""
        remark = Remark(self.current, describe(op), text, UNKNOWN if op is None else op.loc)
        if remark not in self.remarks[-64:]:  # fix(...) rounds see the same op again
            self.remarks.append(remark)

    def allows(self, rule: str, op: Op) -> bool:
        """Whether the rewrite "pass/rule" may be made at `op`. The rule driver asks for its rules; a pass that changes
        ops with its own hands asks before every change, and so can be bisected down to a single one.

        Listeners are asked in order until one refuses: those that limit stand before those that watch, which would wait
        for a `tried` that never comes."""
        return all(listener.allows(rule, op) for listener in self.listeners)

    def tried(self, rule: str, op: Op, fired: bool, made: Sequence[Op] = ()) -> None:
        """Says how an allowed rewrite went; `made` are the ops that it made, or leaves in place of `op`."""
        self.rewrites += fired
        for listener in reversed(self.listeners):  # who began to watch last, stops first
            listener.tried(rule, op, fired, made)


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

    The other class variables are promises. The laws (xllm_compiler.testing.laws) hold every pass to all of them, but
    for those that it takes back by setting them otherwise.
    """

    name: ClassVar[str]
    needs: ClassVar[Stage] = "graph"
    leaves: ClassVar[Stage] = "graph"

    ulps: ClassVar[int] = 12
    """Rounding that the pass may add or spare: units of the dtype's spacing at a result's largest value."""

    changes_signature: ClassVar[bool] = False
    """Arguments, returns and aliases of functions stay as they are unless set."""

    reorders_collectives: ClassVar[bool] = False
    """Per group, the sequence of collectives stays as it is unless set."""

    idempotent: ClassVar[bool] = True
    """A second run changes nothing."""

    samples: ClassVar[tuple[str, ...]] = ()
    """Further settings to hold to the laws, such as "{act=false}"; the defaults always are."""

    @property
    def loss(self) -> float:
        """0: every function computes what it did, within `ulps`. Otherwise what the pass, with these options, gives up
        on purpose: the RMS error that it puts into what a linear layer multiplies, as a share of that one's RMS."""
        return 0.0

    @abstractmethod
    def run(self, module: Module, ctx: PassContext) -> bool:
        """Changes `module`; True when it did."""


def said(p: Pass, method: str, changed: object) -> bool:
    """What a pass returned, which must be True or False; a forgotten `return` is told as such."""
    if not isinstance(changed, bool):
        help = "return True when the module was changed, and False otherwise"
        raise XllmError("internal", f"{method}() of pass {p.name} returned {changed!r}", help=help)
    return changed


@dataclass(frozen=True)
class FuncPass(Pass):
    """A pass that treats every function by itself."""

    def run(self, module: Module, ctx: PassContext) -> bool:
        changed = False
        for func in module.funcs.values():
            changed |= said(self, "run_on", self.run_on(func, ctx))
        return changed

    @abstractmethod
    def run_on(self, func: Func, ctx: PassContext) -> bool:
        """Changes `func`; True when it did."""
