"""CHECK lines against an output, through the `filecheck` package. Owns how a mismatch is shown, and alone knows the
package, which follows LLVM's FileCheck: `{{regex}}`, `[[NAME:regex]]`, `[[NAME]]`; blanks match blanks.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import re
from dataclasses import dataclass
from typing import Any, Final

from xllm_compiler.errors import XllmError
from xllm_compiler.testing.directives import Check

AROUND: Final = 2  # lines shown before and after the place where matching stopped
NEAREST: Final = 3  # lines that are most like the expected one
WIDTH: Final = 200


@dataclass(frozen=True, slots=True)
class Mismatch:
    """`line`: of the CHECK that is to blame, 0 when it is the output; `text`: everything a reader needs."""

    line: int
    text: str


def check_output(check: Check, file: str, output: str, expected: int) -> Mismatch | None:
    """Compares `output` with the CHECK lines in the file at `file`, of which we have counted `expected`."""
    package = _package()
    options = package.Options(
        match_filename=file,
        check_prefixes=list(check.prefixes),
        match_full_lines="--match-full-lines" in check.flags,
        strict_whitespace="--strict-whitespace" in check.flags,
        dump_input=package.DumpInputKind.NEVER,  # or it writes to our standard error
    )
    if not output.strip():
        return Mismatch(0, "the output is empty")
    try:
        ops = tuple(package.Parser.from_opts(options))
    except package.ParseError as e:
        return Mismatch(e.line_no, f"{e.message}\n    {e.offending_line.strip()}")
    if len(ops) != expected:
        raise XllmError(
            "internal",
            f"filecheck reads {len(ops)} lines of {', '.join(check.prefixes)}, and there are {expected}",
            where=file,
            help="a CHECK line that mentions RUN or COM before its own prefix is a comment to filecheck",
        )
    matcher = package.Matcher(options, package.FInput("output", output), iter(ops))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.closing(matcher.stderr):
        return _match(package, matcher, ops, output)  # the package prints its progress through DAG blocks


def _match(package: Any, matcher: Any, ops: tuple[Any, ...], output: str) -> Mismatch | None:
    """What Matcher.run does, with the failure in hand instead of on standard error."""
    steps = {
        "DAG": matcher.check_dag,
        "COUNT": matcher.check_count,
        "NOT": matcher.enqueue_not,
        "EMPTY": matcher.check_empty,
        "NEXT": matcher.match_immediately,
        "SAME": matcher.match_eventually,
        "LABEL": matcher.check_label,
        "CHECK": matcher.match_eventually,
    }
    op: Any = None
    last: tuple[Any, int] | None = None
    try:
        package.Preprocessor(matcher.opts, matcher.file, ops).run()
        for op in ops:
            start = matcher.file.range.start
            matcher._pre_check(op)
            steps[op.name](op)
            matcher._post_check(op)
            if op.name != "NOT":
                last = (op, max(matcher.file.range.start, start))
        matcher.file.range.start = len(output) - 1
        matcher._post_check(package.CheckOp("END", "NOP", "", -1, []))  # CHECK-NOT up to the end
    except package.CheckError as e:
        return Mismatch(e.op.source_line, _report(e.op, e.message, output, last, matcher.ctx.live_variables))
    except package.ErrorOnMatch as e:
        line = output.count("\n", 0, e.match.start()) + 1
        shown = "\n".join(_window(output, line, {line: f"matches {e.op.check_name}"}))
        return Mismatch(e.op.source_line, f"{e.op.check_name}: {e.op.arg}\n  is in the output, at line {line}\n{shown}")
    except (AssertionError, RuntimeError):  # the package runs past the end of its range: nothing is left to match
        return Mismatch(op.source_line, _report(op, "nothing is left", output, last, matcher.ctx.live_variables))
    return None


def _report(op: Any, message: str, output: str, last: tuple[Any, int] | None, variables: dict[str, Any]) -> str:
    """The CHECK line, where matching stood, and what it was most likely meant to match."""
    lines = output.split("\n")
    out = [f"{op.check_name}: {op.arg}", "  is not in the output" + (_rule(op) if last else "")]
    if message.startswith(("Variable", "Malformed", "Empty")):
        out[1] = f"  {message}"
    used = {name: variables[name] for name in re.findall(r"\[\[\$?(\w+)\]\]", op.arg) if name in variables}
    out += [f"  with {name} = {value!r}" for name, value in used.items()]
    at = 0
    if last is not None:
        previous, position = last
        at = output.count("\n", 0, max(position - 1, 0)) + 1
        out.append(f"matching had come to line {at}")
        out += _window(output, at, {at: f"matched by line {previous.source_line}, {previous.check_name}"})
    else:
        out.append("nothing had been matched before; the output begins")
        out += _window(output, 1, {})
    near = _nearest(op.arg, lines, at)
    if near:
        out.append("most like it" if at == 0 else f"most like it, after line {at}")
        out += [_numbered(n, lines) for n in near]
    return "\n".join(out)


def _rule(op: Any) -> str:
    return {
        "NEXT": ", not on the line after the last match",
        "SAME": ", not on the line of the last match",
        "EMPTY": ": the line after the last match is not empty",
        "COUNT": f", not {getattr(op, 'count', 0)} times",
        "LABEL": "",
    }.get(op.name, ", not after the last match")


def _nearest(arg: str, lines: list[str], after: int) -> list[int]:
    """Numbers of the lines that hold most of `arg`, in its order, best first."""
    plain = " ".join(re.sub(r"\{\{.*?\}\}|\[\[(?:\w+:)?.*?\]\]", " ", arg).split())
    scored = []
    for n, line in enumerate(lines, 1):
        if n > after and plain:
            matcher = difflib.SequenceMatcher(None, plain, " ".join(line.split()), autojunk=False)
            held = sum(b.size for b in matcher.get_matching_blocks() if b.size > 1) / len(plain)
            if held > 0.6:
                scored.append((-held, -matcher.ratio(), n))
    return [n for _, _, n in sorted(scored)[:NEAREST]]


def _window(output: str, line: int, notes: dict[int, str]) -> list[str]:
    lines = output.split("\n")
    last = len(lines) - (not lines[-1])
    shown = range(max(1, line - AROUND), min(last, line + AROUND) + 1)
    return [_numbered(n, lines) + (f"   <- {notes[n]}" if n in notes else "") for n in shown]


def _numbered(n: int, lines: list[str]) -> str:
    text = lines[n - 1]
    return f"  {n:4} | {text if len(text) <= WIDTH else text[: WIDTH - 3] + '...'}"


@dataclass(frozen=True)
class _Package:
    """The parts of `filecheck` that we use."""

    Options: Any
    DumpInputKind: Any
    Parser: Any
    ParseError: Any
    Matcher: Any
    FInput: Any
    Preprocessor: Any
    CheckOp: Any
    CheckError: Any
    ErrorOnMatch: Any


def _package() -> _Package:
    try:
        from filecheck.error import CheckError, ErrorOnMatch, ParseError
        from filecheck.finput import FInput
        from filecheck.matcher import Matcher
        from filecheck.ops import CheckOp
        from filecheck.options import DumpInputKind, Options
        from filecheck.parser import Parser
        from filecheck.preprocess import Preprocessor
    except ImportError as e:
        raise XllmError(
            "option", f"CHECK lines need the package filecheck: {e}", help="pip install 'xllm-compiler[testing]'"
        ) from None
    return _Package(
        Options, DumpInputKind, Parser, ParseError, Matcher, FInput, Preprocessor, CheckOp, CheckError, ErrorOnMatch
    )
