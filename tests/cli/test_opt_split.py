"""`xllm-opt --split-file` and `--verify-diagnostics`: several modules in a file, and what must be said about them."""

from __future__ import annotations

from pathlib import Path

import pytest

from xllm_compiler.tools.opt import main

ONE = """\
xir 1 stage=graph

func @a(%x: f32[8]) -> (f32[8]) {
  %y = t.neg(%x) : f32[8]
  %d = t.exp(%x) : f32[8]
  return %y
}
"""
TWO = """\
xir 1 stage=graph

func @b(%x: f32[8]) -> (f32[8]) {
  %y = t.ngg(%x) : f32[8]
  return %y
}
"""
THREE = ONE.replace("@a", "@c")
SEPARATOR = "\n// -----\n\n"
ALL = SEPARATOR.join([ONE, TWO, THREE])
ERROR = """\
error[ir]: unknown op t.ngg
  at m.xir:14:8
      %y = t.ngg(%x) : f32[8]
           ^^^^^
"""

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def opt(text: str, *flags: str) -> int:
    Path("m.xir").write_text(text)
    return main(["m.xir", "--split-file", *flags])


def test_one_that_fails_does_not_stop_the_others(capsys: Capture) -> None:
    assert opt(ALL, "-p", "dce") == 2
    out, err = capsys.readouterr()
    dead = "  %d = t.exp(%x) : f32[8]\n"
    assert out == (ONE + SEPARATOR + THREE).replace(dead, "")
    assert err.startswith(ERROR) and err.count("error[") == 1


def test_what_comes_out_may_go_in_again(capsys: Capture) -> None:
    assert opt(ONE + SEPARATOR + THREE) == 0
    assert capsys.readouterr() == (ONE + SEPARATOR + THREE, "")


def test_parts_that_hold_comments_only_are_no_modules(capsys: Capture) -> None:
    text = f"// RUN: something\n// -----\n{ONE}// ---------  \n\n// the end\n"
    assert opt(text) == 0
    assert capsys.readouterr() == (ONE, "")
    assert opt("// nothing\n") == 0
    assert capsys.readouterr() == ("", "")


def test_a_dashed_comment_elsewhere_separates_nothing(capsys: Capture) -> None:
    assert opt(ONE.replace("  %d", "  // -----\n  %d")) == 0
    assert capsys.readouterr().out == ONE


def test_files_are_numbered_by_module(faulty: str, capsys: Capture) -> None:
    assert opt(ONE + SEPARATOR + THREE, "--load", faulty, "-p", "fault-lies", "--dump-dir", "d") == 1
    assert capsys.readouterr().err.count("repro: xllm-opt xllm-repro-") == 2
    found = sorted(str(p) for p in Path().rglob("*.xir"))
    assert found == ["d-1/00-input.xir", "d-2/00-input.xir", "m.xir", "xllm-repro-1.xir", "xllm-repro-2.xir"]


def test_dumps_of_the_dial_are_numbered_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLLM_DEBUG", "4")
    assert opt(ONE + SEPARATOR + THREE, "-p", "dce", "-o", "out.xir") == 0
    found = sorted(str(p) for p in Path().rglob("00-input.xir"))
    assert found == ["xllm-dump-1/00-input.xir", "xllm-dump-2/00-input.xir"]


def test_diagnostics_as_expected(capsys: Capture) -> None:
    expected = ALL.replace("t.ngg(%x) : f32[8]", "t.ngg(%x) : f32[8]  // ERROR: unknown op t.ngg")
    assert opt(expected, "--verify-diagnostics", "-o", "out.xir") == 0
    assert capsys.readouterr() == ("", "")
    assert Path("out.xir").read_text() == ONE + SEPARATOR + THREE


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("", "", "m.xir:14: unexpected error about line 14: unknown op t.ngg"),
        (
            "t.ngg(%x) : f32[8]",
            "t.ngg(%x) : f32[8]  // ERROR: unknown op t.neg",
            "m.xir:14: line 14 has another error:\n  expected  unknown op t.neg\n  said      unknown op t.ngg",
        ),
        (
            "func @b",
            "// ERROR: unknown op\nfunc @b",
            "m.xir:13: the error 'unknown op' is about line 15, not line 14\n",
        ),
        (
            "t.ngg(%x) : f32[8]",
            "t.neg(%x) : f32[8]  // ERROR: unknown op t.ngg",
            "m.xir:14: expected an error about line 14, and there was none: unknown op t.ngg",
        ),
    ],
)
def test_every_other_diagnostic_is_told(old: str, new: str, message: str, capsys: Capture) -> None:
    assert opt(ALL.replace(old, new) if old else ALL, "--verify-diagnostics") == 1
    assert capsys.readouterr().err.startswith(message)


def test_remarks_are_diagnostics_too(capsys: Capture) -> None:
    text = """\
xir 1 stage=graph
dim N in [1, 64]
func @f(%x: f32[N, 8]) -> (f32[N, 6], f32[N, 6]) {
  %g = param(name="g") : f32[6, 8]
  %u = param(name="u") : f32[6, 8]
  %a = nn.linear(%x, %g) : f32[N, 6]
  %b = nn.linear(%x, %u) : f32[N, 6]
  %c = t.silu(%a) : f32[N, 6]
  %y = t.mul(%c, %b) : f32[N, 6]  // REMARK: gate or up projection has another user
  return %y, %b
}
"""
    assert opt(text, "-p", "fuse-glu", "--verify-diagnostics") == 0
    assert capsys.readouterr().err == ""
    assert opt(text, "-p", "fuse-qkv", "--verify-diagnostics") == 1
    assert "expected a remark about line 9, and there was none" in capsys.readouterr().err
