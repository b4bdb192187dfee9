"""Writes the CHECK lines that follow `// BLESS`, and nothing else of a file. Owns how an output becomes CHECK lines.

    // RUN: xllm-opt %s -p fuse-glu | filecheck %s
    // BLESS
    // CHECK: func @f(..                 these lines are replaced; CHECK lines elsewhere are their author's
    // CHECK-NEXT: %y = nn.linear_glu(..

An output with functions is told function by function, without the declarations above them; another one line by line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from xllm_compiler.errors import XllmError
from xllm_compiler.testing.filetest import Failure, FileTest

REFUSED = "not blessed: what the file says besides its CHECK lines does not hold"


def bless(path: Path | str) -> list[Failure]:
    """Brings the blessed lines of a file up to date and says what does not hold then. A file without BLESS is only run;
    one that fails in anything but its CHECK lines stays as it is."""
    try:
        test = FileTest.read(path)
        wrong = [f for i in range(len(test.directives.runs)) for f in test.run(i, checks=not test.directives.bless)]
        if not test.directives.bless or wrong:
            return [Failure(f.path, f.line, f"{f.text}\n{REFUSED}") for f in wrong] if test.directives.bless else wrong
        _rewrite(Path(path), test)
        test = FileTest.read(path)
    except XllmError as e:
        return [Failure(str(path), 0, str(e))]
    return [f for i in range(len(test.directives.runs)) for f in test.run(i)]


def _rewrite(path: Path, test: FileTest) -> None:
    (run,) = [r for r in test.directives.runs if r.check is not None]
    assert run.check is not None
    outcome = test.call(run)
    prefix = run.check.prefixes[0]
    old = path.read_bytes().decode("utf-8")
    lines = old.split("\n")
    at = test.directives.bless  # the line after BLESS, counted from 0
    end = at
    checks = {line for line, _ in test.directives.checks}
    while end + 1 in checks:
        end += 1
    row = lines[at - 1]
    indent, tail = row[: len(row) - len(row.lstrip())], "\r" if row.endswith("\r") else ""
    fresh = [f"{indent}// {text}{tail}" for text in check_lines(outcome.both if run.both else outcome.out, prefix)]
    new = "\n".join([*lines[:at], *fresh, *lines[end:]])
    if new != old:
        path.write_bytes(new.encode("utf-8"))


def check_lines(output: str, prefix: str = "CHECK") -> Iterator[str]:
    """CHECK lines that accept `output`, and of its functions nothing but them."""
    plain = re.search(r"^func @", output, re.MULTILINE) is None
    inside, first = plain, True
    for line in output.rstrip("\n").split("\n"):
        if not plain and line.startswith("func @"):
            inside = first = True
        if not inside or (first and not line.strip()):
            continue
        if line.strip():
            literal = "{LITERAL}" if "{{" in line or "[[" in line else ""
            yield f"{prefix}{'' if first else '-NEXT'}{literal}: {line.rstrip()}"
        else:
            yield f"{prefix}-NEXT: {{{{^[ \t]+$}}}}" if line else f"{prefix}-EMPTY:"
        first = False
        inside = plain or line != "}"
