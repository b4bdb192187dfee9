"""Errors and remarks against the lines that expect them. Owns what a diagnostic is and how a difference is told; must
not run anything.

    match_diagnostics(text, filename, [Diagnostic("error", 7, "unknown op nn.lineer")])   # [] when that was expected
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from xllm_compiler.errors import XllmError
from xllm_compiler.ir.diag import IrError
from xllm_compiler.passes.base import Remark
from xllm_compiler.testing.directives import Expected, Kind, expectations


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """Something said about a line of a file; line 0: about none. The text of an error has its help on a second line."""

    kind: Kind
    line: int
    text: str

    @staticmethod
    def of_error(error: XllmError, filename: str) -> Diagnostic:
        """The line in `filename` of the op that an error, or its cause, blames, or of what could not be parsed."""
        cause: BaseException | None = error
        line = 0
        while not line and isinstance(cause, XllmError):
            op = cause.op if isinstance(cause, IrError) else None
            if op is not None and op.loc.file == filename:
                line = op.loc.line
            elif m := re.match(re.escape(filename) + r":(\d+)(?::|$)", cause.where, re.MULTILINE):
                line = int(m[1])
            cause = cause.__cause__
        return Diagnostic("error", line, error.message + (f"\nhelp: {error.help}" if error.help else ""))

    @staticmethod
    def of_remark(remark: Remark, filename: str) -> Diagnostic:
        """The line that the remark's op was read from."""
        return Diagnostic("remark", remark.loc.line if remark.loc.file == filename else 0, remark.text)


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that was said and should not have been, or the other way round; `line` is where to look in the file."""

    line: int
    text: str


def match_diagnostics(text: str, filename: str, said: Iterable[Diagnostic], split: bool = False) -> list[str]:
    """How `said` differs from the ERROR and REMARK lines of `text`, each as `FILE:LINE: what`; empty when it does not.
    `split`: the file holds several modules."""
    expected = expectations(text, filename, split)
    return [f"{filename}:{d.line}: {d.text}" for d in differences(expected, said, all_remarks=True)]


def differences(expected: Sequence[Expected], said: Iterable[Diagnostic], all_remarks: bool) -> list[Difference]:
    """Pairs what was said with what was expected. Remarks that nobody expects are wrong where `all_remarks` are to be
    told, and in a file that expects any."""
    all_remarks |= any(e.kind == "remark" for e in expected)
    left = [d for d in dict.fromkeys(said) if d.kind == "error" or all_remarks]
    open_: list[Expected] = []
    for e in sorted(expected, key=lambda e: e.at == 0):  # those that fit anywhere take what others leave
        hit = next((d for d in left if d.kind == e.kind and e.at in (0, d.line) and e.fits(d.text)), None)
        if hit is None:
            open_.append(e)
        else:
            left.remove(hit)
    out: list[Difference] = []
    for e in sorted(open_, key=lambda e: e.line):
        same_text = next((d for d in left if d.kind == e.kind and e.fits(d.text)), None)
        same_line = next((d for d in left if d.kind == e.kind and e.at and d.line == e.at), None)
        if same_text is not None:
            left.remove(same_text)
            what = f"the {e.kind} {e.text!r} is about {_line(same_text.line)}, not line {e.at}"
        elif same_line is not None:
            left.remove(same_line)
            what = f"line {e.at} has another {e.kind}:\n  expected  {e.text}\n  said      {_indent(same_line.text)}"
        else:
            where = f" about line {e.at}" if e.at else ""
            what = f"expected {_a(e.kind)}{where}, and there was none: {e.text}"
        out.append(Difference(e.line, what))
    out += [Difference(d.line, f"unexpected {d.kind} about {_line(d.line)}: {_indent(d.text)}") for d in left]
    return out


def _line(line: int) -> str:
    return f"line {line}" if line else "no line of this file"


def _a(kind: Kind) -> str:
    return "an error" if kind == "error" else "a remark"


def _indent(text: str) -> str:
    return text.replace("\n", "\n            ")
