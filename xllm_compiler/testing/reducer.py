"""Makes a module that shows a failure as small as it gets. Owns the search; cuts.py says what may be cut.

    small = reduce_module(module, lambda m: breaks(m))

Delta debugging: every cut is tried on halves, then quarters, down to single atoms, coarse cuts before fine ones, round
after round until a round changes nothing. A candidate counts when it is simpler, verifies and still fails.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from xllm_compiler.errors import XllmError
from xllm_compiler.ir.clone import clone_module
from xllm_compiler.ir.core import Module
from xllm_compiler.ir.hash import structural_hash
from xllm_compiler.ir.verify import verify
from xllm_compiler.testing.cuts import CUTS, Cut, simpler
from xllm_compiler.testing.edits import Edit, rebuild


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a reduction stands: `cut` is what is being tried, `tried` the candidates that were put to the test."""

    cut: str
    ops: int
    tried: int
    shrank: bool


class _OutOfTime(Exception):
    pass


class Reduction:
    """One run. `best` is the smallest failing module so far, also after an exception ended the run."""

    def __init__(
        self,
        module: Module,
        still_fails: Callable[[Module], bool],
        *,
        time_limit: float | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self.best = clone_module(module)
        self.still_fails = still_fails
        self.progress = progress
        self.deadline = None if time_limit is None else time.monotonic() + time_limit
        self.tried = 0
        self.timed_out = False
        self._seen = {structural_hash(module)}

    def run(self) -> Module:
        """Reduces to a fixed point, or until the time is up."""
        if not self.still_fails(clone_module(self.best)):
            raise XllmError("option", "there is nothing to reduce: the module does not show the failure")
        try:
            while any([self.sweep(cut) for cut in CUTS]):  # a list: every cut has its turn in every round
                pass
        except _OutOfTime:
            self.timed_out = True
        return self.best

    def sweep(self, cut: Cut[object]) -> bool:
        """Tries `cut` on ever smaller runs of atoms; whether anything went."""
        shrank = False
        size = len(cut.atoms(self.best)) if cut.together else 1
        while size:
            at = 0
            atoms = cut.atoms(self.best)
            while at < len(atoms):
                if self.attempt(cut, atoms[at : at + size]):
                    shrank = True
                    atoms = cut.atoms(self.best)  # what followed has moved to `at`
                else:
                    at += size
            size = min(size, len(atoms) + 1) // 2
        return shrank

    def attempt(self, cut: Cut[object], atoms: Sequence[object]) -> bool:
        """Tries the edits of one run of atoms; takes the first that still fails."""
        for edit in cut.edits(self.best, atoms):
            if self.deadline is not None and time.monotonic() > self.deadline:
                raise _OutOfTime
            candidate = self.candidate(edit)
            if candidate is None:
                continue
            self.tried += 1
            shrank = self.still_fails(candidate)
            if shrank:
                self.best = rebuild(self.best, edit)  # again: the test may have changed the one that it was given
            if self.progress is not None:
                self.progress(Progress(cut.name, op_count(self.best), self.tried, shrank))
            if shrank:
                return True
        return False

    def candidate(self, edit: Edit) -> Module | None:
        """The edited module if it is worth a test: well-formed, simpler and new."""
        try:
            module = rebuild(self.best, edit)
            if not simpler(module, self.best):
                return None
            verify(module)
        except XllmError:
            return None
        digest = structural_hash(module)
        if digest in self._seen:
            return None
        self._seen.add(digest)
        return module


def reduce_module(
    module: Module,
    still_fails: Callable[[Module], bool],
    *,
    time_limit: float | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Module:
    """The smallest module found on which `still_fails` holds; `module` itself stays as it is.

    `still_fails` may do what it likes with the module that it is given; an exception of it ends the search. XllmError
    of kind "option" when it does not hold for `module`. Deterministic if it is and `time_limit` (seconds) is not hit.
    """
    return Reduction(module, still_fails, time_limit=time_limit, progress=progress).run()


def op_count(module: Module) -> int:
    return sum(len(f.ops) for f in module.funcs.values())
