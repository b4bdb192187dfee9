"""Runs one file test. Owns the order of the checks and what a failure says; must not know pytest.

    for failure in run_file_test(Path("tests/passes/fuse-glu/two-linears.xir")):
        print(failure)

Every RUN line is called as its tool would be, in this process. EQUIV, UNCHANGED, ERROR and REMARK look at the modules
themselves: the same file is parsed and the same pipeline run once more, so that lines and values are at hand.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xllm_compiler.errors import XllmError
from xllm_compiler.ir.clone import clone_module
from xllm_compiler.ir.core import Module
from xllm_compiler.ir.hash import structural_hash
from xllm_compiler.ir.parser import parse_module
from xllm_compiler.ir.printer import print_module
from xllm_compiler.ir.verify import verify
from xllm_compiler.passes.base import PassContext
from xllm_compiler.passes.listeners import Fuel
from xllm_compiler.passes.manager import run_pipeline
from xllm_compiler.testing.diagnostics import Diagnostic, differences
from xllm_compiler.testing.directives import Directives, Run, mask, parse_directives
from xllm_compiler.testing.filecheck import check_output
from xllm_compiler.tools.files import read_text

BLESS_HINT = "no CHECK lines follow BLESS: run pytest --bless, and read what it writes"
DIFF_LINES = 40


@dataclass(frozen=True, slots=True)
class Failure:
    """What did not hold. `line`: where to look in the file, 0 for nowhere in particular."""

    path: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.text}" if self.line else f"{self.path}: {self.text}"


def run_file_test(path: Path | str) -> list[Failure]:
    """Everything that does not hold, of all RUN lines; empty for a test that passes."""
    try:
        test = FileTest.read(path)
    except XllmError as e:
        return [Failure(str(path), 0, str(e))]
    return [failure for index in range(len(test.directives.runs)) for failure in test.run(index)]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a tool did: exit code, standard output, standard error, and the two as they came."""

    code: int
    out: str
    err: str
    both: str


@dataclass(slots=True)
class _Seen:
    """The modules of a file before and after the pipeline, and what was said about them."""

    modules: list[tuple[Module, Module]] = field(default_factory=list)
    said: list[Diagnostic] = field(default_factory=list)
    ulps: int = 0


@dataclass(frozen=True)
class FileTest:
    """One file and what it expects."""

    path: str
    directives: Directives

    @staticmethod
    def read(path: Path | str) -> FileTest:
        """Raises an XllmError for a file whose directives are wrong."""
        return FileTest(str(path), parse_directives(read_text(str(path)), str(path)))

    def run(self, index: int, *, checks: bool = True) -> list[Failure]:
        """What does not hold of one RUN line. `checks=False`: all but its CHECK lines."""
        d, run = self.directives, self.directives.runs[index]
        outcome = self.call(run)
        tool_verifies = "--verify-diagnostics" in run.args
        seen = self._observe(run) if d.expected or d.equiv or d.unchanged else None
        wrong: list[Failure] = []
        if seen is not None:
            silent = not any(s.kind == "error" for s in seen.said)
            if outcome.code and silent and not tool_verifies:  # the tool itself failed, of its flags for instance
                seen.said.append(Diagnostic("error", 0, outcome.err.strip()))
            wrong += [self._failure(w.line, w.text) for w in differences(d.expected, seen.said, tool_verifies)]
        expects = any(e.kind == "error" for e in d.expected) and not tool_verifies
        if outcome.code and not (expects or run.fails or wrong):
            wrong.append(self._failure(run.line, f"{run.tool} failed, exit code {outcome.code}\n{_clip(outcome.err)}"))
        if not outcome.code and (run.fails or expects) and not wrong:
            wrong.append(self._failure(run.line, f"{run.tool} was to fail and did not"))
        if wrong:
            return wrong
        if seen is not None and run.has_pipeline and (d.unchanged or d.equiv):
            wrong += self._unchanged(seen) if d.unchanged else []
            wrong += self._equal(seen) if d.equiv else []
            if not seen.modules:
                wrong.append(self._failure(run.line, "there is no module in this file"))
        return wrong + (self._check(run, outcome) if checks else [])

    def call(self, run: Run) -> Outcome:
        """Runs the tool of a RUN line in this process."""
        main = importlib.import_module(f"xllm_compiler.tools.{run.tool.removeprefix('xllm-')}").main
        out, err, both = io.StringIO(), io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(_Tee(out, both)), contextlib.redirect_stderr(_Tee(err, both)):
            code = main(self._argv(run))
        return Outcome(code, out.getvalue(), err.getvalue(), both.getvalue())

    def _argv(self, run: Run) -> list[str]:
        argv = run.argv(self.path, str(Path(self.path).parent))
        if run.tool == "xllm-opt" and not any(a.startswith("--repro") for a in argv):
            argv.append("--no-repro")  # a test that expects a pass to fail leaves no file behind
        return argv

    def _failure(self, line: int, text: str) -> Failure:
        return Failure(self.path, line, text)

    def _observe(self, run: Run) -> _Seen:
        seen = _Seen()
        try:
            if run.tool == "xllm-opt":
                self._run_pipeline(self._argv(run), seen)
            else:
                verify(parse_module(mask(read_text(self.path)), self.path))
        except XllmError as e:
            seen.said.append(Diagnostic.of_error(e, self.path))
        return seen

    def _run_pipeline(self, argv: Sequence[str], seen: _Seen) -> None:
        """What xllm-opt does with these arguments, module by module."""
        from xllm_compiler.passes.registry import load_passes
        from xllm_compiler.tools.opt import checked_pipeline, parser
        from xllm_compiler.tools.opt_job import Job, split

        args: Any = parser().read(argv)
        for spec in args.load:
            load_passes(spec)
        pipeline = checked_pipeline(args)
        seen.ulps = max((p.ulps for p in pipeline.passes()), default=0)
        text = mask(read_text(self.path))
        for job in split(text, self.path) if args.split_file else [Job(text, self.path)]:
            ctx = PassContext()
            if args.fuel is not None:
                ctx.listeners.append(Fuel(args.fuel))
            try:
                module = parse_module(job.text, job.name)
                before = clone_module(module)
                run_pipeline(pipeline, module, ctx, verify_each=not args.no_verify_each, limit=args.pass_limit)
                verify(module)
                seen.modules.append((before, module))
            except XllmError as e:
                seen.said.append(Diagnostic.of_error(e, self.path))
            seen.said += [Diagnostic.of_remark(r, self.path) for r in ctx.remarks]

    def _unchanged(self, seen: _Seen) -> list[Failure]:
        wrong = []
        for before, after in seen.modules:
            if structural_hash(before) != structural_hash(after):
                old, new = print_module(before).splitlines(), print_module(after).splitlines()
                lines = list(difflib.unified_diff(old, new, "before", "after", lineterm="", n=2))
                if not lines:  # names and notes are printed, but no part of the hash, and the other way round
                    lines = ["(both print alike)"]
                text = "\n".join(f"  {line}" for line in lines[:DIFF_LINES])
                more = f"\n  and {len(lines) - DIFF_LINES} lines more" if len(lines) > DIFF_LINES else ""
                wrong.append(self._failure(self.directives.unchanged, f"the module was changed\n{text}{more}"))
        return wrong

    def _equal(self, seen: _Seen) -> list[Failure]:
        from xllm_compiler.testing.equiv import check_equal

        d, wrong = self.directives, []
        assert d.equiv is not None
        for before, after in seen.modules:
            try:
                found = check_equal(before, after, d.sizes(before.scope), ulps=seen.ulps)
            except XllmError as e:
                wrong.append(self._failure(d.equiv.line, f"EQUIV cannot be decided\n{e}"))
                continue
            if found is not None:
                wrong.append(self._failure(d.equiv.line, f"the meaning has changed\n{found}"))
        return wrong

    def _check(self, run: Run, outcome: Outcome) -> list[Failure]:
        if run.check is None:
            return []
        count = sum(prefix in run.check.prefixes for _, prefix in self.directives.checks)
        if not count:
            return [self._failure(self.directives.bless, BLESS_HINT)]
        found = check_output(run.check, self.path, outcome.both if run.both else outcome.out, count)
        return [] if found is None else [self._failure(found.line or run.line, found.text)]


class _Tee(io.StringIO):
    """Writes to two places, so that a stream can be read alone and among the other."""

    def __init__(self, *targets: io.StringIO) -> None:
        super().__init__()
        self._targets = targets

    def write(self, text: str) -> int:
        for target in self._targets:
            target.write(text)
        return len(text)


def _clip(text: str, lines: int = DIFF_LINES) -> str:
    rows = text.strip().splitlines()
    shown = "\n".join(f"  {row}" for row in rows[:lines])
    return shown + (f"\n  and {len(rows) - lines} lines more" if len(rows) > lines else "")
