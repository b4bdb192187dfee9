"""What the levels of XLLM_DEBUG show of a pipeline run. Owns the mapping of levels to instruments; console.py reads the
dial."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from xllm_compiler.passes.base import Pass, PassContext
from xllm_compiler.passes.instruments import DumpDir, Instrument, PrintAfter
from xllm_compiler.passes.manager import PassRun, PipelineReport
from xllm_compiler.tools.console import DUMP_DIR

if TYPE_CHECKING:
    from xllm_compiler.errors import XllmError
    from xllm_compiler.ir.core import Module


class PassTable(Instrument):
    """Prints the table of passes at the end of a run, also of one that a pass ended early."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self._runs: list[PassRun] = []

    def after(self, run: PassRun, module: Module) -> None:
        self._runs.append(run)

    def failed(self, index: int, p: Pass, module: Module, error: XllmError) -> None:
        self._print()

    def finished(self, report: PipelineReport, module: Module) -> None:
        self._print()

    def _print(self) -> None:
        table = PipelineReport(PassContext(), self._runs).table()
        self.stream.write(f"{table}\n" if table else "no pass ran\n")
        self._runs = []


def debug_instruments(level: int, stream: TextIO, dump_dir: Path = Path(DUMP_DIR)) -> list[Instrument]:
    """What `level` of XLLM_DEBUG adds to a run of passes: 2 the table, 3 diffs, 4 dumps."""
    found: list[Instrument] = []
    if level >= 3:
        found.append(PrintAfter(stream, "changed", diff=True))
    if level >= 2:
        found.append(PassTable(stream))
    if level >= 4:
        found.append(DumpDir(dump_dir))
    return found
