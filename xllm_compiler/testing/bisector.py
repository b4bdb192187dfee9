"""Finds the first pass run that goes wrong, and in it the one rewrite. Owns the search; rewrites.py tells of a rewrite.

    finding = bisect(module, "fuse-glu,fuse-qkv")          # None: nothing wrong
    print(finding)

Two binary searches: how many pass runs it takes, then how many rewrites of the guilty run (Fuel). Both keep one end
that is good and one that is bad: what they end at is good just before and bad just after, though badness need not grow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from xllm_compiler.errors import XllmError
from xllm_compiler.ir.clone import clone_module
from xllm_compiler.ir.core import Module
from xllm_compiler.ir.printer import print_module
from xllm_compiler.ir.rewrite import RewriteListener
from xllm_compiler.passes.base import Pass, PassContext
from xllm_compiler.passes.instruments import Instrument, diff_text
from xllm_compiler.passes.listeners import Fuel
from xllm_compiler.passes.manager import Pipeline, item_text, parse_pipeline
from xllm_compiler.testing.equiv import Reference
from xllm_compiler.testing.failures import DIFFERS_EXACTLY, CheckName, Failure, compare, run_passes
from xllm_compiler.testing.inputs import Sizes
from xllm_compiler.testing.rewrites import Application, Attempts, Close, place_of

IsBad = Callable[[Module], bool]
Judge = Callable[[Module, Module], Failure | None]  # of a module before and after some passes

_SHOWN = 60  # lines of a diff


@dataclass(frozen=True, slots=True)
class Repro:
    """A way to see the failure again: `module` and arguments for xllm-opt. With fuel it is one rewrite too many."""

    module: Module
    pipeline: str
    limit: int | None = None
    fuel: int | None = None

    def words(self) -> list[str]:
        """--pass-limit and --fuel as far as there are any."""
        limit = [] if self.limit is None else ["--pass-limit", str(self.limit)]
        return limit + ([] if self.fuel is None else ["--fuel", str(self.fuel)])


@dataclass(frozen=True, slots=True)
class Finding:
    """The first pass run after which something is wrong, and the rewrite in it that is to blame, if that can be told.

    `whole` shows it on the module that was bisected, `repro` on the IR right before. `number` is that of the rewrite in
    the guilty run, which would make `rewrites` in all. `diff` is what the pass changed, where no rewrite is named.
    """

    run: int
    runs: int
    pass_text: str
    failure: Failure
    whole: Repro
    repro: Repro
    rewrite: Application | None = None
    number: int = 0
    rewrites: int = 0
    notes: tuple[str, ...] = ()
    diff: str = ""

    @property
    def raised(self) -> str:
        """Said of a rewrite that was begun and never made."""
        return ", while making it" if self.failure.kind == "raises" else ""

    def __str__(self) -> str:
        lines = [f"guilty: {self.pass_text}, pass run {self.run} of {self.runs}"]
        if self.rewrite is not None:
            lines[0] += f", rewrite {self.number} of {self.rewrites}" + self.raised
            lines += ["", *str(self.rewrite).splitlines()]
        elif self.diff:
            lines += ["", "what the pass changed:", *("    " + line for line in _capped(self.diff))]
        lines += ["", "what is wrong then:", *("    " + line for line in self.failure.text.splitlines())]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def _capped(diff: str) -> list[str]:
    lines = diff.splitlines()
    return lines if len(lines) <= _SHOWN else [*lines[:_SHOWN], f".. {len(lines) - _SHOWN} more lines"]


class Equivalence:
    """A judge: bad is what computes something else, by equiv.py. A module is interpreted once for all its results."""

    def __init__(self, pipeline: Pipeline, sizes: Sequence[Sizes] | None, seed: int) -> None:
        self.ulps = max((p.ulps for p in pipeline.passes()), default=0)
        self.sizes, self.seed, self.typed = sizes, seed, True
        self._known: tuple[Module, Reference] | None = None

    def __call__(self, before: Module, after: Module) -> Failure | None:
        if self._known is None or self._known[0] is not before:
            self._known = before, Reference(before, self.sizes, typed=self.typed, seed=self.seed)
        return compare(self._known[1], after, self.ulps)

    def narrow(self, failure: Failure) -> None:
        """From now on only looks where `failure` was seen."""
        if failure.sizes is not None:
            self.sizes, self.typed, self._known = [failure.sizes], failure.signature != DIFFERS_EXACTLY, None


def told_by(is_bad: IsBad) -> Judge:
    """Bad is what `is_bad` says is."""

    def judge(before: Module, after: Module) -> Failure | None:
        return Failure(("told",), "the test says that the module is bad") if is_bad(after) else None

    return judge


def bisect(
    module: Module,
    pipeline: str | Pipeline,
    is_bad: IsBad | None = None,
    *,
    check: CheckName = "equiv",
    sizes: Sequence[Sizes] | None = None,
    seed: int = 0,
) -> Finding | None:
    """What goes wrong first when `pipeline` runs on `module`, or None.

    A pass that raises is bad, and with `check` "verify" one that leaves broken IR. Beyond that, `is_bad` decides about
    what passes leave; None: with `check` "equiv" what it computes. XllmError of kind "option" when the module is bad
    before any pass has run.
    """
    plan = parse_pipeline(pipeline) if isinstance(pipeline, str) else pipeline
    judge: Judge | None = None
    if is_bad is not None:
        judge = told_by(is_bad)
    elif check == "equiv":
        judge = Equivalence(plan, sizes, seed)
    return Bisection(module, plan, judge, check).run()


class _Runs(Instrument):
    """Which passes ran, and the last one that was begun."""

    def __init__(self) -> None:
        self.begun: list[Pass] = []

    def before(self, index: int, p: Pass, module: Module) -> None:
        self.begun.append(p)


@dataclass(frozen=True, slots=True)
class _Try:
    """A module with some passes run on it."""

    module: Module
    failure: Failure | None
    begun: list[Pass]
    rewrites: int


class Bisection:
    """One search. `judge` is asked about results that no pass has failed on; None: those are good."""

    def __init__(self, module: Module, pipeline: Pipeline, judge: Judge | None, check: CheckName) -> None:
        self.module = module
        self.pipeline = pipeline
        self.judge = judge
        self.check = check

    def run(self) -> Finding | None:
        """The search; see `bisect`."""
        full = self.attempt(self.module, self.pipeline)
        if full.failure is None:
            return None
        if isinstance(self.judge, Equivalence):
            self.judge.narrow(full.failure)
        elif self.judge is not None and self.judge(self.module, clone_module(self.module)) is not None:
            raise XllmError(
                "option",
                "the module is bad before any pass has run",
                help="give a test that finds the module itself good, or another module",
            )
        good, bad = 0, full.failure.run or len(full.begun)
        after = full
        while bad - good > 1:
            middle = (good + bad) // 2
            tried = self.attempt(self.module, self.pipeline, limit=middle)
            if tried.failure is None:
                good = middle
            else:
                bad, after = tried.failure.run or middle, tried
        # A failure at an earlier run than asked for may have moved `bad` down to what is known to be good.
        before = self.attempt(self.module, self.pipeline, limit=bad - 1)
        if before.failure is not None:
            raise XllmError(
                "internal",
                f"pass run {bad} is bad, and without it the result is bad in one try and good in another",
                help="a pass is not deterministic; run the pipeline twice and compare",
            )
        return self.inside(bad, len(full.begun), before, after)

    def attempt(
        self,
        module: Module,
        pipeline: str | Pipeline,
        *,
        limit: int | None = None,
        fuel: int | None = None,
        watch: Sequence[RewriteListener] = (),
    ) -> _Try:
        """Runs passes on a copy of `module` and judges the result against it."""
        after, runs = clone_module(module), _Runs()
        ctx = PassContext(listeners=[*([] if fuel is None else [Fuel(fuel)]), *watch])
        failure = run_passes(pipeline, after, self.check, ctx=ctx, limit=limit, instruments=[runs])
        if failure is None and self.judge is not None:
            failure = self.judge(module, after)
        return _Try(after, failure, runs.begun, ctx.rewrites)

    def inside(self, run: int, runs: int, before: _Try, after: _Try) -> Finding:
        """The second search: among the rewrites of pass run `run`, which turns `before` bad."""
        start, p = before.module, after.begun[run - 1]
        text = item_text(p)
        whole = Repro(self.module, str(self.pipeline), run)
        alone = self.attempt(start, text)
        if alone.failure is None:
            # Only together with what earlier runs changed: half of a difference that alone is within its bounds.
            notes = (f"{text} by itself is good on the IR before it: the difference has built up over several passes",)
            return _as_a_whole(run, runs, text, start, after, whole, whole, notes)
        failure = alone.failure
        most = alone.rewrites + (failure.kind == "raises")  # the one that raised is not counted
        if most == 0 or failure.same_as(self.attempt(start, text, fuel=0).failure):
            why = "goes wrong without any of the rewrites that it asks leave for"
            if alone.rewrites == 0:
                why = "does not ask before it rewrites (PassContext.allows), so no single rewrite can be named"
            said: tuple[str, ...] = () if failure.kind == "claim" else (f"{text} {why}",)
            return _as_a_whole(run, runs, text, start, alone, whole, Repro(start, text), said)
        good, bad = 0, most
        while bad - good > 1:
            middle = (good + bad) // 2
            tried = self.attempt(start, text, fuel=middle)
            if failure.same_as(tried.failure):
                bad, failure = middle, tried.failure or failure
            else:
                good = middle
        return self.close_by(run, runs, before, p, bad, most, failure)

    def close_by(
        self, run: int, runs: int, before: _Try, p: Pass, number: int, rewrites: int, failure: Failure
    ) -> Finding:
        """The finding about rewrite `number` of the guilty run."""
        start, text = before.module, item_text(p)
        notes: list[str] = []
        just_before = self.attempt(start, text, fuel=number - 1)
        if just_before.failure is not None:
            first = just_before.failure.text.splitlines()[0]
            notes.append(
                f"with one rewrite less something else is wrong, and this one may only have changed it: {first}"
            )
        attempts = Attempts()
        self.attempt(start, text, fuel=number, watch=[attempts])
        close = Close(attempts.of_rewrite(number))
        self.attempt(start, text, fuel=number, watch=[close])
        whole = Repro(self.module, str(self.pipeline), run, before.rewrites + number)
        if not failure.same_as(self.attempt(self.module, whole.pipeline, limit=run, fuel=whole.fuel).failure):
            notes.append("the whole pipeline with that fuel does not show it: passes behave differently when run again")
        repro = None if just_before.failure is not None else self.from_here(just_before.module, text, failure)
        repro = repro or Repro(start, text, None, number)
        seen = close.application(place_of(type(p), close.rule))
        return Finding(run, runs, text, failure, whole, repro, seen, number, rewrites, tuple(notes))

    def from_here(self, module: Module, text: str, failure: Failure) -> Repro | None:
        """A repro on the IR right before the rewrite: with it alone where the pass comes to it first, else with as
        few as it takes. None when it depends on the rewrites made before."""
        if failure.same_as(self.attempt(module, text, fuel=1).failure):
            return Repro(module, text, None, 1)
        alone = self.attempt(module, text)
        if not failure.same_as(alone.failure):
            return None
        good, bad = 1, alone.rewrites + (failure.kind == "raises")
        while bad - good > 1:
            middle = (good + bad) // 2
            if failure.same_as(self.attempt(module, text, fuel=middle).failure):
                bad = middle
            else:
                good = middle
        return Repro(module, text, None, bad)


def _as_a_whole(
    run: int, runs: int, text: str, start: Module, after: _Try, whole: Repro, repro: Repro, notes: tuple[str, ...]
) -> Finding:
    """The finding about a pass run of which no single rewrite is to blame."""
    assert after.failure is not None
    diff = "" if after.failure.kind == "raises" else diff_text(print_module(start), print_module(after.module))
    return Finding(run, runs, text, after.failure, whole, repro, notes=notes, diff=diff)
