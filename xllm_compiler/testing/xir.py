"""Trying a pass on IR text from Python: parse, run, ask. Owns no judgement; meanings are compared by equiv.py.

case = Case.parse(text).run("fuse-add-norm")
case.changed            # did the pipeline change anything?
case.op_names()         # what is left
case.check_same()       # before and after compute the same, at several step sizes
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from xllm_compiler.ir.clone import clone_module
from xllm_compiler.ir.core import Module
from xllm_compiler.ir.hash import structural_hash
from xllm_compiler.ir.parser import parse_module
from xllm_compiler.ir.printer import print_module
from xllm_compiler.passes.base import PassContext
from xllm_compiler.passes.manager import parse_pipeline, run_pipeline
from xllm_compiler.testing.equiv import check_equal
from xllm_compiler.testing.inputs import Sizes


@dataclass
class Case:
    """A module before and after a pipeline."""

    before: Module
    after: Module
    ctx: PassContext = field(default_factory=PassContext)
    ulps: int = 0  # what the passes that ran may add, together

    @staticmethod
    def parse(text: str) -> Case:
        module = parse_module(text, "test.xir")
        return Case(module, clone_module(module))

    def run(self, pipeline: str) -> Case:
        """Runs passes on `after`; may be called again."""
        plan = parse_pipeline(pipeline)
        run_pipeline(plan, self.after, self.ctx)
        self.ulps += max((p.ulps for p in plan.passes()), default=0)
        return self

    @property
    def changed(self) -> bool:
        return structural_hash(self.before) != structural_hash(self.after)

    @property
    def text(self) -> str:
        return print_module(self.after)

    def op_names(self, func: str = "") -> list[str]:
        """Names of the ops left, without parameters and constants."""
        f = self.after.funcs[func] if func else next(iter(self.after.funcs.values()))
        return [op.name for op in f.ops if op.name not in ("param", "t.const")]

    def remarks(self) -> str:
        return "\n".join(map(str, self.ctx.remarks))

    def check_same(self, sizes: Sequence[int | Sizes] = (1, 2, 7), seed: int = 0, typed: bool = True) -> None:
        """AssertionError with equiv's report unless every function returns what it did; an integer size is N."""
        has_n = "N" in self.before.scope.symbols
        given = [({"N": s} if has_n else {}) if isinstance(s, int) else s for s in sizes]
        found = check_equal(self.before, self.after, given, ulps=self.ulps, typed=typed, seed=seed)
        assert found is None, str(found)
