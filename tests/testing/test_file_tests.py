"""File tests: what a file may say, what every kind of failure says, blessing."""

from __future__ import annotations

import io
import re
import tempfile
from pathlib import Path

import pytest
from filecheck.finput import FInput
from filecheck.matcher import Matcher
from filecheck.options import DumpInputKind, Options
from filecheck.parser import Parser
from hypothesis import given
from hypothesis import strategies as st

from xllm_compiler.errors import XllmError
from xllm_compiler.passes.registry import BUILTIN, pass_class
from xllm_compiler.testing.bless import bless, check_lines
from xllm_compiler.testing.diagnostics import Diagnostic, match_diagnostics
from xllm_compiler.testing.directives import (
    ALONE,
    FILECHECK_FLAGS,
    SUFFIXES,
    Check,
    holds_directives,
    mask,
    parse_directives,
)
from xllm_compiler.testing.filecheck import check_output
from xllm_compiler.testing.filetest import FileTest, run_file_test

HERE = Path(__file__).parent
LOAD = f"--load {HERE / 'lab_passes.py'}"
RUN = "// RUN: xllm-opt %s -p dce | filecheck %s\n"
MODULE = """xir 1 stage=graph
dim N in [1, 64]  // tokens
dim B in [1, 8]
assume N - B >= 0

func @f(%x: f32[N, 8]) -> (f32[N, 8]) {
  %minus = t.neg(%x) : f32[N, 8]
  %y = t.exp(%minus) : f32[N, 8]
  return %y
}
"""


def refusal(text: str) -> str:
    with pytest.raises(XllmError) as e:
        parse_directives(text, "t.xir")
    return str(e.value)


def run(folder: Path, text: str) -> str:
    """The failures of a file with this text, as people see them, without the folder."""
    path = folder / "t.xir"
    path.write_text(text)
    return "\n".join(map(str, run_file_test(path))).replace(f"{folder}/", "")


# ---------------------------------------------------------------------------------------------------------- directives


@pytest.mark.parametrize(
    ("line", "says", "help"),
    [
        ("// CHEKC: a", "CHEKC is no directive", "did you mean CHECK:"),
        ("// CHECK_NEXT: a", "CHECK_NEXT is no directive", "did you mean CHECK-NEXT:"),
        ("// CHECKNEXT: a", "CHECKNEXT is no directive", "did you mean CHECK-NEXT:"),
        ("// CHECK-NXT: a", "CHECK-NXT is no directive", "did you mean CHECK-NEXT:"),
        ("// Check: a", "Check is no directive", "did you mean CHECK:"),
        ("// check-next: a", "check-next is no directive", "did you mean CHECK-NEXT:"),
        ("// CHECK-COUNT: a", "CHECK-COUNT is no directive", "did you mean CHECK-COUNT-n:"),
        ("// CHECK a", "CHECK without its colon expects nothing", "write CHECK:"),
        ("// CHECK NEXT: a", "CHECK without its colon expects nothing", "write CHECK:"),
        ("// CHECK : a", "CHECK without its colon expects nothing", "write CHECK:"),
        ("// CHECK:", "CHECK: says nothing", ""),
        ("// EQUIVALENT: N=1", "there is no directive EQUIVALENT:", "did you mean EQUIV; for prose, do without the"),
        ("// EQUIV N=1", "EQUIV without its colon expects nothing", "write EQUIV:"),
        ("// EQUIV: N 1", "cannot read 'N'", "EQUIV: N=1,2,7 B=1,2"),
        ("// EQUIV: N=1 N=2", "cannot read 'N=2'", "names each symbol once"),
        ("// EQUIV: N=1\n// EQUIV: B=2", "EQUIV is said twice", "one line names all symbols"),
        ("// UNCHANGED: so", "UNCHANGED stands alone", "write `// UNCHANGED`"),
        ("// UNCHANGED because", "UNCHANGED stands alone", "write `// UNCHANGED`"),
        ("// UNCHANGD", "UNCHANGD is no directive", "did you mean UNCHANGED"),
        ("// unchanged", "unchanged is no directive", "did you mean UNCHANGED"),
        ("// BLES", "BLES is no directive", "did you mean BLESS"),
        ("// NOTE: a", "there is no directive NOTE:", "for prose, do without the colon"),
        ("// error: a", "error is no directive", "did you mean ERROR:"),
        ("// REMAKR: a", "REMAKR is no directive", "did you mean REMARK:"),
        ("// as CHECK: shows", "filecheck would read CHECK: in this line", "reword it"),
        ("// ERROR{LITERAL}: a", "{LITERAL} is for CHECK lines", ""),
        ("// ERROR: {{(}}", "not a regular expression", ""),
        ("// RNU: xllm-opt %s", "RNU is no directive", "did you mean RUN:"),
        ("// RUN: xllm-otp %s", "RUN starts xllm-opt or xllm-run, not 'xllm-otp'", "did you mean xllm-opt"),
        ("// RUN: xllm-opt -p dce", "RUN does not read this file", "give %s to the tool"),
        ("// RUN: xllm-opt %s 'a", "cannot read the command: No closing quotation", ""),
        ("// RUN: xllm-opt %s | FileCheck %s", "after | comes `filecheck %s`", ""),
        ("// RUN: xllm-opt %s | filecheck %s --chek-prefix=A", "filecheck has no --chek-prefix=A", "--check-prefix=P"),
        ("// RUN: xllm-opt %s | filecheck %s --check-prefix=A", "no line begins with A:", "write what to expect"),
        ("// RUN: xllm-opt %s | filecheck %s --check-prefix=RUN", "RUN cannot be a prefix", "no directive"),
        ("// RUN: xllm-opt %s 2>&1", "2>&1 without | filecheck has no effect", ""),
        ("// RUN: xllm-opt %s", "this RUN line expects nothing", "CHECK, EQUIV, UNCHANGED, ERROR or REMARK"),
        ("// ERROR: a\n// UNCHANGED", "a RUN that fails leaves nothing to compare", "stands without EQUIV"),
        ("// ERROR: a", "a RUN that fails prints nothing to check", "2>&1 | filecheck %s reads errors"),
        ("// RUN: not xllm-opt %s -p dce\n// UNCHANGED", "`not` says that this fails", ""),
        ("// BLESS\n// BLESS", "BLESS is said twice", ""),
        ("// REMARK: CHECK: is no line", "filecheck would read CHECK: in this line", "reword it"),
        ("// RUN: xllm-run %s N=1\n// EQUIV: N=1", "this RUN line expects nothing", ""),
    ],
)
def test_what_is_nearly_a_directive_is_refused(line: str, says: str, help: str) -> None:
    text = f"{RUN}// CHECK: func @f\n{line}\n{MODULE}"
    told = refusal(text)
    assert says in told and help in told
    assert "at t.xir:" in told and "^" in told


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("// CHECK: a\n", "t.xir:1:1\n    // CHECK: a\n    ^^^^^^^^^^^\n  help: add `| filecheck %s`"),
        ("// UNCHANGED\n", "this file has no RUN line"),
        ("// EQUIV: N=1\n", "this file has no RUN line"),
        (RUN, "no line begins with CHECK:"),
        ("// RUN: xllm-opt %s | filecheck %s --check-prefix=A\n// A: x\n// CHECK: y\n", "for CHECK lines"),
        ("// RUN: xllm-opt %s -p dce\n// UNCHANGED\n// CHECK: y\n", "for CHECK lines"),
        ("// RUN: xllm-opt %s\n// UNCHANGED\n", "no RUN line has a pipeline that could change anything"),
        ("// RUN: xllm-run %s\n// EQUIV: N=1\n", "no RUN line has a pipeline that could change anything"),
        ("// RUN: xllm-opt %s -p dce\n// UNCHANGED\n// BLESS\n", "BLESS needs exactly one RUN line with filecheck"),
        (RUN + RUN + "// BLESS\n", "BLESS needs exactly one RUN line with filecheck"),
        (RUN + "// CHECK: f\n%y = t.neg(%x) : f32[N] // CHECK: z\n", "CHECK stands behind code"),
        (RUN + "// CHECK: f\n// REMARK: r\n", "no line follows that this REMARK could be about"),
    ],
)
def test_lines_that_need_each_other(text: str, says: str) -> None:
    assert says in refusal(text)


def test_prose_is_no_directive() -> None:
    text = """// RUN: xllm-opt %s -p dce
// UNCHANGED
// GLU of two linears, KV cache, and an error or a remark; run the check: it is unchanged.
// Next to this: nothing. https://example.org
// -----
dim N in [1, 8]  // tokens: all of them
func @f(%x: i32[N // 16]) -> (i32[N // 2,
    // a comment in brackets
    4]) {
"""
    assert parse_directives(text, "t.xir").unchanged == 2
    assert holds_directives(text) and not holds_directives("// NOTE: plain\n// a file\n" + MODULE)
    assert holds_directives("// CHEKC: a\n") and holds_directives("// run: xllm-opt %s\n")


WORDS = ["RUN", "EQUIV", "ERROR", "REMARK", "UNCHANGED", "BLESS", "CHECK", "CHECK-NEXT", "CHECK-NOT", "CHECK-LABEL"]


@given(st.sampled_from(WORDS), st.integers(0, 20), st.sampled_from(["drop", "swap", "double", "lower"]))
def test_one_slip_in_a_directive_is_seen(word: str, at: int, slip: str) -> None:
    i = at % len(word)
    made = {
        "drop": word[:i] + word[i + 1 :],
        "swap": word[:i] + word[i + 1 : i + 2] + word[i] + word[i + 2 :],
        "double": word[: i + 1] + word[i:],
        "lower": word[:i] + word[i].lower() + word[i + 1 :],
    }[slip]
    if made in WORDS or not made.strip("-"):
        return
    tail = "" if word in ("UNCHANGED", "BLESS") else ": xllm-opt %s | filecheck %s"
    assert "t.xir:3" in refusal(f"{RUN}// CHECK: func\n// {made}{tail}\n{MODULE}")


def test_mask_keeps_every_place() -> None:
    text = "%y = t.neg((%x : i32[N // 4]  // ERROR: expected\n// REMARK: r\ndim N in [1, 2]  // tokens\n"
    masked = mask(text)
    assert len(masked) == len(text) and "ERROR" not in masked and "REMARK" not in masked
    assert "i32[N // 4]" in masked and "// tokens" in masked


# ----------------------------------------------------------------------------------------------------------- filecheck

OUTPUT = """func @f(%x: f32[N, 8]) {
  %a = t.neg(%x) : f32[N, 8]
  %b = t.exp(%a) : f32[N, 8]
  %c = t.exp(%b) : f32[N, 8]

  return %c
}
"""
CASES = [
    ("CHECK: t.neg\nCHECK-NEXT: t.exp(%a)\n", 0),
    ("CHECK: t.exp(%b)\nCHECK: t.neg\n", 2),
    ("CHECK: t.neg\nCHECK-NEXT: t.exp(%b)\n", 2),
    ("CHECK: t.neg\nCHECK-SAME: f32\nCHECK-SAME: t.exp\n", 3),
    ("CHECK: [[V:%[a-z]+]] = t.neg\nCHECK: t.exp([[V]])\nCHECK: t.exp([[V]])\n", 3),
    ("CHECK: {{%[a-z]}} = t.exp(%b)\nCHECK-EMPTY:\nCHECK-NEXT: return\n", 0),
    ("CHECK: t.exp(%a)\nCHECK-EMPTY:\n", 2),
    ("CHECK: func\nCHECK-NOT: t.exp\nCHECK: return\n", 2),
    ("CHECK: return\nCHECK-NOT: t.exp\n", 0),
    ("CHECK: func\nCHECK-NOT: }\n", 2),
    ("CHECK-DAG: t.exp(%b)\nCHECK-DAG: t.neg\nCHECK: return\n", 0),
    ("CHECK-DAG: t.exp(%b)\nCHECK-DAG: t.sin\n", 2),
    ("CHECK-COUNT-2: t.exp\nCHECK: return\n", 0),
    ("CHECK-COUNT-3: t.exp\n", 1),
    ("CHECK-LABEL: func @f\nCHECK: t.neg\n", 0),
    ("CHECK-LABEL: func @g\nCHECK: t.neg\n", 1),
    ("CHECK: [[W]]\n", 1),
    ("CHECK: }\nCHECK-NEXT: more\n", 2),
    ("CHECK: }\nCHECK-EMPTY:\nCHECK-NEXT: more\n", 3),
]


@pytest.mark.parametrize(("checks", "line"), CASES)
def test_the_adapter_judges_as_filecheck_does(checks: str, line: int, tmp_path: Path) -> None:
    path = tmp_path / "checks.txt"
    path.write_text(checks)
    found = check_output(Check(), str(path), OUTPUT, checks.count("CHECK"))
    assert (found.line if found else 0) == line
    opts = Options(match_filename=str(path), dump_input=DumpInputKind.NEVER)
    matcher = Matcher(opts, FInput("out", OUTPUT), Parser.from_opts(opts))
    matcher.stderr.close()
    matcher.stderr = io.StringIO()
    try:
        code = matcher.run()
    except (AssertionError, RuntimeError):  # the package itself gives up behind the last line
        code = 1
    assert bool(code) == bool(line)


def test_a_mismatch_shows_the_line_the_place_and_what_is_most_like_it(tmp_path: Path) -> None:
    path = tmp_path / "checks.txt"
    path.write_text("CHECK: [[V:%[a-z]+]] = t.neg\nCHECK-NEXT: %c = t.exp([[V]]) : bf16\n")
    found = check_output(Check(), str(path), OUTPUT, 2)
    assert (
        found is not None
        and found.text
        == """\
CHECK-NEXT: %c = t.exp([[V]]) : bf16
  is not in the output, not on the line after the last match
  with V = '%a'
matching had come to line 2
     1 | func @f(%x: f32[N, 8]) {
     2 |   %a = t.neg(%x) : f32[N, 8]   <- matched by line 1, CHECK
     3 |   %b = t.exp(%a) : f32[N, 8]
     4 |   %c = t.exp(%b) : f32[N, 8]
most like it, after line 2
     4 |   %c = t.exp(%b) : f32[N, 8]
     3 |   %b = t.exp(%a) : f32[N, 8]"""
    )
    path.write_text("CHECK: func\nCHECK-NOT: t.exp(%b)\n")
    found = check_output(Check(), str(path), OUTPUT, 2)
    assert found is not None and found.line == 2
    assert "is in the output, at line 4" in found.text and "<- matches CHECK-NOT" in found.text


def test_flags_prefixes_and_an_empty_output(tmp_path: Path) -> None:
    path = tmp_path / "checks.txt"
    path.write_text("AFTER: t.neg(%x)\nBEFORE: t.exp(%a)\n")
    assert check_output(Check(("AFTER", "BEFORE")), str(path), OUTPUT, 2) is None
    assert check_output(Check(("AFTER",), ("--match-full-lines",)), str(path), OUTPUT, 1) is not None
    empty = check_output(Check(("AFTER",)), str(path), "\n", 1)
    assert empty is not None and empty.text == "the output is empty"


# -------------------------------------------------------------------------------------------------------- diagnostics


def test_errors_and_remarks_are_held_against_their_lines() -> None:
    text = "xir 1\n%a  // ERROR: one\n// REMARK: t{{w|h}}o\n\n%b\n"
    right = [Diagnostic("error", 2, "it is one thing"), Diagnostic("remark", 5, "two")]
    assert match_diagnostics(text, "t", right) == []
    assert match_diagnostics(text, "t", right[1:]) == ["t:2: expected an error about line 2, and there was none: one"]
    moved = [Diagnostic("error", 3, "one"), right[1]]
    assert match_diagnostics(text, "t", moved) == ["t:2: the error 'one' is about line 3, not line 2"]
    other = [right[0], Diagnostic("remark", 5, "three")]
    told = ["t:3: line 5 has another remark:\n  expected  t{{w|h}}o\n  said      three"]
    assert match_diagnostics(text, "t", other) == told
    more = [*right, Diagnostic("remark", 7, "more"), Diagnostic("error", 0, "again")]
    assert match_diagnostics(text, "t", more) == [
        "t:7: unexpected remark about line 7: more",
        "t:0: unexpected error about no line of this file: again",
    ]
    # Before everything, one is expected anywhere.
    assert match_diagnostics("// REMARK: two\nxir 1\n%b\n", "t", right[1:]) == []
    # A remark that is said again is one remark.
    assert match_diagnostics(text, "t", [*right, right[1]]) == []


# ----------------------------------------------------------------------------------------------------------- file tests


def test_a_file_that_holds(tmp_path: Path) -> None:
    header = f"""// RUN: xllm-opt %s {LOAD} -p lab-remark | filecheck %s
// RUN: xllm-opt %s -p fold,dce --print-changed | filecheck %s --check-prefix=MINUS
// UNCHANGED
// EQUIV: N=1,7 B=1,2
// CHECK: t.exp(%minus)
// MINUS: t.neg(%x)
"""
    assert run(tmp_path, header + MODULE) == ""


def test_a_pass_that_changes_the_meaning(tmp_path: Path) -> None:
    told = run(tmp_path, f"// RUN: xllm-opt %s {LOAD} -p lab-wrong\n// EQUIV: N=1,7\n{MODULE}")
    assert told.startswith("t.xir:2: the meaning has changed\n@f does not compute what it did: return 0, %y: f32[N, 8]")
    assert "the first value that is not what its namesake was: %minus" in told


def test_a_module_that_was_to_stay(tmp_path: Path) -> None:
    told = run(tmp_path, f"// RUN: xllm-opt %s {LOAD} -p lab-wrong\n// UNCHANGED\n{MODULE}")
    assert told.startswith("t.xir:2: the module was changed\n")
    assert "  -  %minus = t.neg(%x) : f32[N, 8]\n  +  %minus = t.abs(%x) : f32[N, 8]" in told


@pytest.mark.parametrize(
    ("equiv", "says"),
    [
        ("M=1", "EQUIV names M, which the file does not declare"),
        ("N=65", "65"),
        ("N=1 B=2", "N - B >= 0"),
    ],
)
def test_sizes_that_the_file_does_not_allow(equiv: str, says: str, tmp_path: Path) -> None:
    told = run(tmp_path, f"// RUN: xllm-opt %s -p dce\n// EQUIV: {equiv}\n{MODULE}")
    assert told.startswith("t.xir:2: EQUIV cannot be decided\n") and "t.xir:2:1" in told
    assert says in told or (equiv == "M=1" and "no size M" in told)


LINE = "  %y = t.exp(%minus) : f32[N, 8]"


def test_an_error_on_its_line(tmp_path: Path) -> None:
    head = f"// RUN: not xllm-opt %s {LOAD} -p lab-blame\n"
    right = MODULE.replace(LINE, f"{LINE}  // ERROR: cannot take exp of %minus")
    assert run(tmp_path, head + right) == ""
    before = MODULE.replace(LINE, f"  // ERROR: cannot take {{{{exp|sin}}}}\n\n{LINE}")
    assert run(tmp_path, head + before) == ""
    helped = MODULE.replace(LINE, f"{LINE}  // ERROR: help: take it elsewhere")
    assert run(tmp_path, head + helped) == ""
    wrong_line = MODULE.replace("  return", "  // ERROR: cannot take exp\n  return")
    assert run(tmp_path, head + wrong_line) == "t.xir:10: the error 'cannot take exp' is about line 9, not line 11"
    another = MODULE.replace(LINE, f"{LINE}  // ERROR: cannot take sin")
    assert run(tmp_path, head + another).startswith("t.xir:9: line 9 has another error:\n  expected  cannot take sin\n")
    no_error = f"// RUN: not xllm-opt %s -p dce\n{right}"
    told = "t.xir:9: expected an error about line 9, and there was none: cannot take exp of %minus"
    assert run(tmp_path, no_error) == told


def test_an_error_that_nobody_expects(tmp_path: Path) -> None:
    told = run(tmp_path, f"// RUN: xllm-opt %s {LOAD} -p lab-blame | filecheck %s\n// CHECK: t.exp\n{MODULE}")
    assert told.startswith("t.xir:1: xllm-opt failed, exit code 2\n  error[ir]: cannot take exp of %minus")
    told = run(tmp_path, f"// RUN: not xllm-opt %s 2>&1 | filecheck %s\n// CHECK: t.exp\n{MODULE}")
    assert told == "t.xir:1: xllm-opt was to fail and did not"
    told = run(tmp_path, f"// RUN: xllm-opt %s -p dce --no-such-flag\n// UNCHANGED\n{MODULE}")
    assert "xllm-opt has no flag --no-such-flag" in told


def test_a_pass_that_crashes_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = f"// ERROR: pass lab-crash failed: ZeroDivisionError: boom\n// RUN: not xllm-opt %s {LOAD} -p lab-crash\n"
    assert run(tmp_path, text + MODULE) == ""
    assert [p.name for p in tmp_path.iterdir()] == ["t.xir"]


def test_parse_errors_are_read_where_comments_could_divide(tmp_path: Path) -> None:
    """The bracket is never closed, so that to the lexer the comment behind it would be a floor division."""
    broken = MODULE.replace("t.neg(%x) : f32[N, 8]", "t.neg(%x : f32[N, 8]  // ERROR: expected")
    assert run(tmp_path, f"// RUN: not xllm-opt %s -p dce\n{broken}") == ""


def test_what_standard_error_says(tmp_path: Path) -> None:
    text = """// RUN: not xllm-opt %s 2>&1 | filecheck %s
// CHECK: error[ir]: unknown op t.nge
// CHECK: t.xir:{{[0-9]+}}:12
// CHECK-NEXT: %minus = t.nge(%x)
// CHECK-NEXT: ^^^^^
"""
    assert run(tmp_path, text + MODULE.replace("t.neg", "t.nge")) == ""


def test_remarks(tmp_path: Path) -> None:
    head = f"// RUN: xllm-opt %s {LOAD} -p lab-remark\n// UNCHANGED\n"
    assert run(tmp_path, head + MODULE) == ""
    assert run(tmp_path, head + MODULE.replace(LINE, f"{LINE} // REMARK: exp of %minus is slow")) == ""
    assert run(tmp_path, f"// REMARK: is slow\n{head}{MODULE}") == ""
    two = MODULE.replace("  return", "  %z = t.exp(%y) : f32[N, 8]\n  return")
    told = run(tmp_path, head + two.replace(LINE, f"{LINE} // REMARK: exp of %minus"))
    assert told == "t.xir:11: unexpected remark about line 11: exp of %y is slow"
    verified = head.replace("-p", "--verify-diagnostics -p")
    assert run(tmp_path, verified + MODULE) == "t.xir:10: unexpected remark about line 10: exp of %minus is slow"
    assert run(tmp_path, verified + MODULE.replace(LINE, f"{LINE} // REMARK: exp of %minus is slow")) == ""


def test_several_modules_in_one_file(tmp_path: Path) -> None:
    right = MODULE.replace(LINE, f"{LINE} // ERROR: cannot take exp of %minus")
    head = f"// RUN: not xllm-opt %s --split-file {LOAD} -p lab-blame\n// ERROR: cannot take exp of %minus\n"
    assert run(tmp_path, f"{head}{MODULE}// -----\n{right}") == ""
    told = run(tmp_path, f"{head}{MODULE}// -----\n{MODULE}")
    assert (
        told
        == "t.xir:21: unexpected error about line 21: cannot take exp of %minus\n            help: take it elsewhere"
    )


def test_a_file_without_a_module(tmp_path: Path) -> None:
    told = run(tmp_path, "// RUN: xllm-opt %s --split-file -p dce\n// UNCHANGED\n// -----\n")
    assert told == "t.xir:1: there is no module in this file"


def test_xllm_run_is_checked_too(tmp_path: Path) -> None:
    text = "// RUN: xllm-run %s N=3 B=1 | filecheck %s\n// CHECK: %y f32[N, 8] [3, 8]\n"
    assert run(tmp_path, text + MODULE) == ""
    assert "CHECK: %y f32[N, 8] [4, 8]" in run(tmp_path, text.replace("[3", "[4") + MODULE)


# ------------------------------------------------------------------------------------------------------------- blessing

BLESSED = """// RUN: xllm-opt %s -p dce,fold | filecheck %s
// EQUIV: N=1,2
// BLESS
// CHECK: func @f(%x: f32[N, 8]) -> (f32[N, 8]) {
// CHECK-NEXT:   %minus = t.neg(%x) : f32[N, 8]
// CHECK-NEXT:   %y = t.exp(%minus) : f32[N, 8]
// CHECK-NEXT:   return %y
// CHECK-NEXT: }

// CHECK-NOT: this line is its author's
"""


def test_blessing_writes_its_own_lines_only(tmp_path: Path) -> None:
    path = tmp_path / "t.xir"
    empty = re.sub(r"// CHECK: func.*?// CHECK-NEXT: }\n", "", BLESSED, flags=re.DOTALL) + MODULE
    path.write_text(empty)
    assert "no CHECK lines" not in str(run_file_test(path))  # the author's line is one
    path.write_text(empty.replace("// CHECK-NOT: this line is its author's\n", ""))
    assert "no CHECK lines follow BLESS: run pytest --bless" in str(run_file_test(path))
    path.write_text(empty)
    assert bless(path) == [] and path.read_text() == BLESSED + MODULE
    stamp = path.stat().st_mtime_ns
    assert bless(path) == [] and path.stat().st_mtime_ns == stamp, "a second blessing writes nothing"
    path.write_text((BLESSED + MODULE).replace("t.exp(%minus)", "t.sin(%minus)", 1))
    assert len(run_file_test(path)) == 1
    assert bless(path) == [] and path.read_text() == BLESSED + MODULE


def test_blessing_keeps_line_ends_and_indentation(tmp_path: Path) -> None:
    path = tmp_path / "t.xir"
    path.write_bytes(f"// RUN: xllm-opt %s -p dce | filecheck %s\n  // BLESS\n{MODULE}".replace("\n", "\r\n").encode())
    assert bless(path) == []
    lines = path.read_bytes().decode().split("\r\n")
    assert lines[2] == "  // CHECK: func @f(%x: f32[N, 8]) -> (f32[N, 8]) {" and "\n" not in "".join(lines)


def test_nothing_is_blessed_while_other_lines_fail(tmp_path: Path) -> None:
    path = tmp_path / "t.xir"
    text = f"// RUN: xllm-opt %s {LOAD} -p lab-wrong | filecheck %s\n// EQUIV: N=1,2\n// BLESS\n{MODULE}"
    path.write_text(text)
    (failure,) = bless(path)
    assert failure.line == 2 and "the meaning has changed" in failure.text and failure.text.endswith("does not hold")
    assert path.read_text() == text


def test_check_lines_of_special_text() -> None:
    assert list(check_lines("a [[1, 2], {{x}}]\n\nb\n", "OUT")) == [
        "OUT{LITERAL}: a [[1, 2], {{x}}]",
        "OUT-EMPTY:",
        "OUT-NEXT: b",
    ]


@given(st.lists(st.text(st.characters(codec="ascii", categories=["L", "N", "P", "S", "Zs"]), max_size=12), min_size=1))
def test_what_is_blessed_passes(rows: list[str]) -> None:
    """Whatever an output holds, its own CHECK lines accept it and are read as that many."""
    output = "start\n" + "\n".join(rows) + "\nend\n"
    lines = list(check_lines(output))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "t.xir")
        path.write_text("".join(f"// {line}\n" for line in lines))
        assert check_output(Check(), str(path), output, len(lines)) is None


# ------------------------------------------------------------------------------------------------------- our own files


def test_the_page_tells_of_everything_that_can_be_said() -> None:
    page = (HERE.parent.parent / "docs" / "file-tests.md").read_text()
    said = [f"`// {word}" for word in ("RUN:", "CHECK:", "EQUIV:", *ALONE)] + ["// ERROR:", "// REMARK:"]
    said += [f"`-{suffix}" for suffix in SUFFIXES if suffix != "NEXT"] + ["`CHECK-NEXT`", *FILECHECK_FLAGS]
    assert [words for words in said if words not in page] == []


@pytest.mark.parametrize("name", sorted(BUILTIN))
def test_every_pass_has_a_file_where_it_acts_and_one_where_it_does_not(name: str) -> None:
    cls = pass_class(name)
    tests = [FileTest.read(path) for path in sorted((HERE.parent / "passes" / name).glob("*.xir"))]
    lossy = cls().loss > 0  # it does not compute the same, on purpose: law `loss` says how nearly
    assert any((t.directives.equiv or lossy) and t.directives.checks for t in tests), "no file shows it at work"
    assert any(t.directives.unchanged for t in tests) or cls.needs != cls.leaves, "no file shows a near miss"
