"""What watches a pipeline run: dumps, printing, history, repro files.

An `Instrument` sees whole passes. Single rewrites are limited and watched by the listeners of passes/listeners.py.
"""

from __future__ import annotations

import difflib
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Final, TextIO

from xllm_compiler.errors import XllmError
from xllm_compiler.ir.clone import clone_module
from xllm_compiler.ir.core import Module
from xllm_compiler.ir.printer import print_module
from xllm_compiler.passes.base import Pass

if TYPE_CHECKING:
    from xllm_compiler.passes.manager import PassRun, Pipeline, PipelineReport

_CONTEXT: Final = 3  # lines around a change in a diff


class Instrument:
    """Told of everything that happens in a run; what it does not override it does not care for.

    `index` counts pass runs from 1, rounds of fix(..) included.
    """

    def started(self, pipeline: Pipeline, module: Module) -> None:
        """Before the first pass; `module` has been verified."""

    def before(self, index: int, p: Pass, module: Module) -> None:
        """Before a pass."""

    def after(self, run: PassRun, module: Module) -> None:
        """After a pass and the checks on what it left."""

    def failed(self, index: int, p: Pass, module: Module, error: XllmError) -> None:
        """A pass raised `error`, or a check after it did; `module` is in an unknown state. The error is raised on."""

    def finished(self, report: PipelineReport, module: Module) -> None:
        """After the last pass."""


class DumpDir(Instrument):
    """Writes `00-input.xir`, one numbered text per run, and `passes.txt`: what each did, and all remarks."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def started(self, pipeline: Pipeline, module: Module) -> None:
        self._write("00-input.xir", print_module(module))

    def after(self, run: PassRun, module: Module) -> None:
        self._write(f"{run.index:02}-{run.name}.xir", print_module(module))

    def finished(self, report: PipelineReport, module: Module) -> None:
        self._write("passes.txt", "\n".join([report.table(), *map(str, report.ctx.remarks)]) + "\n")

    def _write(self, name: str, text: str) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / name).write_text(text, encoding="utf-8")
        except OSError as e:
            raise XllmError("io", f"cannot write the IR dump: {e.strerror}", where=str(self.path)) from e


class PrintAfter(Instrument):
    """Prints the module after passes. `which`: "changed", "all" or a pass name. `diff`: only what the pass changed."""

    def __init__(self, stream: TextIO, which: str = "changed", diff: bool = False) -> None:
        self.stream = stream
        self.which = which
        self.diff = diff
        self._text = ""

    def started(self, pipeline: Pipeline, module: Module) -> None:
        self._text = print_module(module)

    def after(self, run: PassRun, module: Module) -> None:
        text = print_module(module) if run.changed else self._text
        if self.which in ("all", run.name) or (self.which == "changed" and run.changed):
            mark = "" if run.changed else ", no change"
            self.stream.write(f"// ---- after {run.index:02} {run.text}{mark}\n")
            self.stream.write(diff_text(self._text, text) if self.diff else text)
        self._text = text


def diff_text(before: str, after: str) -> str:
    """The lines that differ, as a unified diff without file names; "" when none do."""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), n=_CONTEXT, lineterm="")
    return "".join(f"{line}\n" for line in list(lines)[2:])


class History(Instrument):
    """Keeps the text of the input and after every run that changed something: `texts`, oldest first.

    `loc`: texts carry source lines and lineage. The run is None for the input.
    """

    def __init__(self, loc: bool = False) -> None:
        self.loc = loc
        self.texts: list[tuple[PassRun | None, str]] = []

    def started(self, pipeline: Pipeline, module: Module) -> None:
        self.texts = [(None, print_module(module, self.loc))]

    def after(self, run: PassRun, module: Module) -> None:
        if run.changed:
            self.texts.append((run, print_module(module, self.loc)))


class Repro(Instrument):
    """When a pass fails, writes what it was given to `path` with a RUN line on top, and puts the command into the
    error's help. `flags`: further arguments that the command needs, such as --load and the file of an outside pass.

    The input of the failing pass is made again from the pipeline's input, so that sound runs cost one copy.
    """

    def __init__(self, path: Path, flags: tuple[str, ...] = ()) -> None:
        self.path = path
        self.flags = flags
        self._input = Module()
        self._pipeline: Pipeline | None = None

    def started(self, pipeline: Pipeline, module: Module) -> None:
        self._input, self._pipeline = clone_module(module), pipeline

    def failed(self, index: int, p: Pass, module: Module, error: XllmError) -> None:
        from xllm_compiler.passes.manager import item_text, run_pipeline  # the manager knows instruments

        assert self._pipeline is not None, "a pass failed before the run started"
        module, text = clone_module(self._input), item_text(p)
        try:
            run_pipeline(self._pipeline, module, limit=index - 1)
        except XllmError:  # the passes before it do not do the same twice: the whole pipeline is the repro
            module, text = self._input, str(self._pipeline)
        command = ["-p", text, *self.flags]
        try:
            run = f"// RUN: xllm-opt %s {shlex.join(command)}\n"
            self.path.write_text(run + print_module(module, loc=True), encoding="utf-8")
        except OSError as e:
            said = f"no repro file, cannot write {self.path}: {e.strerror}"
        else:
            said = f"repro: {shlex.join(['xllm-opt', str(self.path), *command])}"
        error.help = f"{error.help}\n  {said}" if error.help else said
