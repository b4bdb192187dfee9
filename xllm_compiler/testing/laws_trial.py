"""One pass on one module, and everything that the laws ask about it. Owns running; judging is laws_judge.py's.

The pass is called by hand and not by the pass manager: each of the manager's checks is a law of its own here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from xllm_compiler.errors import XllmError
from xllm_compiler.ir.clone import clone_module
from xllm_compiler.ir.core import Module
from xllm_compiler.ir.hash import structural_hash
from xllm_compiler.ir.printer import print_module
from xllm_compiler.ir.verify import verify
from xllm_compiler.passes.base import Capabilities, Pass, PassContext
from xllm_compiler.passes.manager import item_text
from xllm_compiler.testing.equiv import Reference
from xllm_compiler.testing.inputs import ranks_of

REFUSALS = ("unsupported", "option")


@dataclass(frozen=True)
class Source:
    """A module to try passes on: a corpus entry at a point of the pipeline."""

    name: str
    """The corpus entry."""
    point: str
    """What has been done to it, such as "as it is" or "before fuse-glu"."""
    module: Module
    """Not to be changed."""
    reference: Callable[[], Reference] = field(repr=False, compare=False)
    """What it computes; made once for all passes."""
    target: Capabilities | None = None
    """What the target can do that the pass is tried for; None: nothing that is known."""

    def __str__(self) -> str:
        return f"{self.name}, {self.point}"

    @property
    def ops(self) -> int:
        return sum(len(f.ops) for f in self.module.funcs.values())


def source_of(module: Module, name: str = "a module", point: str = "as it is") -> Source:
    """A source from anywhere. Its reference is made when first asked for."""
    made: list[Reference] = []

    def reference() -> Reference:
        if not made:
            made.append(Reference(module))
        return made[0]

    return Source(name, point, module, reference)


@dataclass(frozen=True)
class Outcome:
    """What one run of a pass left. `error`: what it raised; the module is in an unknown state then."""

    module: Module
    claimed: bool
    error: Exception | None
    stats: Mapping[str, int]
    remarks: tuple[str, ...]

    @cached_property
    def text(self) -> str:
        """With locations and lineage, so that these too must come out the same."""
        return print_module(self.module, loc=True)

    @cached_property
    def hash(self) -> str:
        return structural_hash(self.module)


def run_pass(p: Pass, module: Module, target: Capabilities | None = None) -> Outcome:
    """Runs `p` on a copy of `module`. `target`: what it can do; None: nothing that is known."""
    copy, ctx = clone_module(module), PassContext(target or Capabilities(), current=p.name)
    error: Exception | None = None
    claimed = False
    try:
        claimed = p.run(copy, ctx)
    except Exception as e:  # whatever it is, it is the pass's, and told as such
        error = e
    stats = dict(sorted(ctx.stats.get(p.name, {}).items()))
    return Outcome(copy, claimed, error, stats, tuple(map(str, ctx.remarks)))


class Trial:
    """A pass with its options on a source. Every part is computed when a law first asks for it."""

    def __init__(self, p: Pass, source: Source) -> None:
        self.p = p
        self.source = source
        self.before = source.module
        self.compared: dict[bool, str | None] = {}  # laws_judge's: how results differ, exactly (True) and typed (False)

    @property
    def setting(self) -> str:
        """The pass as pipeline text."""
        return item_text(self.p)

    @cached_property
    def first(self) -> Outcome:
        return run_pass(self.p, self.before, self.source.target)

    @property
    def after(self) -> Module:
        return self.first.module

    @property
    def refused(self) -> bool:
        """Whether the pass said, in the proper way, that this module is not for it."""
        error = self.first.error
        return isinstance(error, XllmError) and error.kind in REFUSALS

    @cached_property
    def broken(self) -> XllmError | None:
        """Why the result does not verify."""
        try:
            verify(self.after)
        except XllmError as e:
            return e
        return None

    @property
    def sound(self) -> bool:
        """Whether there is a result of which further questions make sense."""
        return self.first.error is None and self.broken is None

    @cached_property
    def before_hash(self) -> str:
        return structural_hash(self.before)

    @cached_property
    def changed(self) -> bool:
        """Whether the module is structurally another one, whatever the pass says."""
        return self.first.error is None and self.first.hash != self.before_hash

    @cached_property
    def ranks(self) -> int:
        return ranks_of(self.before)

    @property
    def reference(self) -> Reference:
        return self.source.reference()
