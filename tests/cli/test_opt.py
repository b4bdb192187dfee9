"""`xllm-opt` on one module: what comes out, where it goes, and every way of asking for something that is not there."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from xllm_compiler.tools.opt import main

SUM_NORM = """\
xir 1 stage=graph
dim N in [1, 64]

func @f(%x: f32[N, 8], %y: f32[N, 8]) -> (f32[N, 8], f32[N, 8]) {
  %w = param(name="w") : f32[8]
  %s = t.add(%x, %y) : f32[N, 8]
  %h = nn.rms_norm(%s, w=%w, eps=1e-05) : f32[N, 8]
  %out = t.neg(%h) : f32[N, 8]
  return %out, %s
}
"""
FUSED = """\
xir 1 stage=graph
dim N in [1, 64]

func @f(%x: f32[N, 8], %y: f32[N, 8]) -> (f32[N, 8], f32[N, 8]) {
  %w = param(name="w") : f32[8]
  %h, %s = nn.add_rms_norm(%x, %y, %w, eps=1e-05) : f32[N, 8], f32[N, 8]
  %out = t.neg(%h) : f32[N, 8]
  return %out, %s
}
"""
DIFF = """\
// ---- after 01 fuse-add-norm
@@ -3,8 +3,7 @@
 
 func @f(%x: f32[N, 8], %y: f32[N, 8]) -> (f32[N, 8], f32[N, 8]) {
   %w = param(name="w") : f32[8]
-  %s = t.add(%x, %y) : f32[N, 8]
-  %h = nn.rms_norm(%s, w=%w, eps=1e-05) : f32[N, 8]
+  %h, %s = nn.add_rms_norm(%x, %y, %w, eps=1e-05) : f32[N, 8], f32[N, 8]
   %out = t.neg(%h) : f32[N, 8]
   return %out, %s
 }
"""

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("m.xir").write_text(SUM_NORM)
    return "m.xir"


def test_without_a_pipeline_it_prints_what_it_read(file: str, capsys: Capture) -> None:
    assert main([file]) == 0
    assert capsys.readouterr() == (SUM_NORM, "")


def test_the_result_is_on_standard_output_alone(file: str, capsys: Capture) -> None:
    flags = ["--stats", "--diff", "--remarks", "--check-equiv=N=1,7"]
    assert main([file, "-p", "fuse-add-norm", *flags]) == 0
    assert capsys.readouterr() == (FUSED, DIFF + "fuse-add-norm: add-norm 1, dead-ops 1\n".replace(", dead-ops 1", ""))


def test_standard_input_and_an_output_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(SUM_NORM))
    out = tmp_path / "out.xir"
    assert main(["-", "-p", "fuse-add-norm,dce", "-o", str(out)]) == 0
    assert capsys.readouterr() == ("", "")
    assert out.read_text() == FUSED


def test_presets(file: str, capsys: Capture) -> None:
    assert main([file, "-p", "@cpu"]) == 0
    assert capsys.readouterr().out.startswith("xir 1 stage=buf\n")


def test_print_after_one_pass_all_or_changed(file: str, capsys: Capture) -> None:
    pipeline = ["-p", "fuse-add-norm,dce"]
    assert main([file, *pipeline, "--print-after", "dce"]) == 0
    assert capsys.readouterr().err == f"// ---- after 02 dce, no change\n{FUSED}"
    assert main([file, *pipeline, "--print-after", "all", "--diff"]) == 0
    assert capsys.readouterr().err == DIFF + "// ---- after 02 dce, no change\n"
    assert main([file, *pipeline, "--print-changed"]) == 0
    assert capsys.readouterr().err == f"// ---- after 01 fuse-add-norm\n{FUSED}"


def test_dumps_are_numbered(file: str) -> None:
    assert main([file, "-p", "fuse-add-norm,dce", "--dump-dir", "dump"]) == 0
    assert sorted(p.name for p in Path("dump").iterdir()) == [
        "00-input.xir",
        "01-fuse-add-norm.xir",
        "02-dce.xir",
        "passes.txt",
    ]
    assert Path("dump/00-input.xir").read_text() == SUM_NORM
    assert Path("dump/02-dce.xir").read_text() == FUSED


def test_times(file: str, capsys: Capture) -> None:
    assert main([file, "-p", "fuse-add-norm,dce", "--time-passes"]) == 0
    first, second = capsys.readouterr().err.splitlines()
    assert first.split()[:6] == ["01", "fuse-add-norm", "changed", "4", "->", "3"] and first.split()[7] == "ms"
    assert second.split()[:3] == ["02", "dce", "-"]


def test_fuel_and_pass_limit_hold_back(file: str, capsys: Capture) -> None:
    assert main([file, "-p", "fuse-add-norm", "--fuel", "0"]) == 0
    assert capsys.readouterr().out == SUM_NORM
    assert main([file, "-p", "fuse-add-norm", "--fuel", "1"]) == 0
    assert capsys.readouterr().out == FUSED
    assert main([file, "-p", "fuse-add-norm", "--pass-limit", "0"]) == 0
    assert capsys.readouterr().out == SUM_NORM


def test_loc_shows_the_source_line_and_the_rule(file: str, capsys: Capture) -> None:
    assert main([file, "-p", "fuse-add-norm", "--loc"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[5].endswith('loc("m.xir":7, "", "fuse-add-norm/add-norm")')
    assert lines[6].endswith('loc("m.xir":8, "")')


REMARKED = """\
xir 1 stage=graph
dim N in [1, 64]
func @f(%x: f32[N, 8]) -> (f32[N, 6], f32[N, 6]) {
  %g = param(name="g") : f32[6, 8]
  %u = param(name="u") : f32[6, 8]
  %a = nn.linear(%x, %g) : f32[N, 6]
  %b = nn.linear(%x, %u) : f32[N, 6]
  %c = t.silu(%a) : f32[N, 6]
  %y = t.mul(%c, %b) : f32[N, 6]
  return %y, %b
}
"""


def test_remarks_as_text_and_as_json_lines(file: str, capsys: Capture) -> None:
    Path("r.xir").write_text(REMARKED)
    text = "gate or up projection has another user; not fused into linear_glu"
    assert main(["r.xir", "-p", "fuse-glu", "--remarks", "--remarks-json", "r.jsonl"]) == 0
    assert capsys.readouterr().err == f"remark: fuse-glu: {text} [%y = t.mul, r.xir:9]\n"
    assert [json.loads(line) for line in Path("r.jsonl").read_text().splitlines()] == [
        {
            "pass": "fuse-glu",
            "text": text,
            "where": "%y = t.mul, r.xir:9",
            "file": "r.xir",
            "line": 9,
            "module_path": "",
            "lineage": [],
        }
    ]
    assert main(["r.xir", "-p", "fuse-glu", "--remarks=^fuse-glu.*linear_glu"]) == 0
    assert text in capsys.readouterr().err
    assert main(["r.xir", "-p", "fuse-glu", "--remarks=qkv"]) == 0
    assert capsys.readouterr().err == ""


def test_explain_shows_the_lines_that_decided(file: str, capsys: Capture) -> None:
    assert main(["m.xir", "-p", "fuse-add-norm", "--explain", "fuse-add-norm/add-norm@h"]) == 0
    assert "fuse-add-norm/add-norm at %h = nn.rms_norm: fired\n" in capsys.readouterr().err
    Path("r.xir").write_text(REMARKED)
    assert main(["r.xir", "-p", "fuse-glu", "--explain", "gated-product@%y"]) == 0
    err = capsys.readouterr().err
    assert "fuse-glu/gated-product at %y = t.mul: did not fire\n" in err and "not fused into linear_glu" in err


def test_explain_says_where_a_rule_is_tried(file: str, capsys: Capture) -> None:
    assert main([file, "-p", "fuse-add-norm", "--explain", "add-norm@out"]) == 0
    said = "fuse-add-norm/add-norm was not tried at %out = t.neg; in this run only at nn.rms_norm\n"
    assert capsys.readouterr().err == said


def test_interp_tells_every_return(file: str, capsys: Capture) -> None:
    assert main([file, "--interp", "N=3"]) == 0
    first = capsys.readouterr().err
    head, out, s = first.splitlines()
    assert head == "@f at N=3"
    assert out.split()[:5] == ["%out", "f32[N,", "8]", "[3,", "8]"] and s.split()[0] == "%s"
    assert [word for word in out.split() if word in ("min", "mean", "max")] == ["min", "mean", "max"]
    assert main([file, "--interp", "N=3"]) == 0
    assert capsys.readouterr().err == first
    assert main([file, "--interp", "N=3", "--seed", "1"]) == 0
    assert capsys.readouterr().err != first


def test_list_passes_and_help_pass(capsys: Capture) -> None:
    assert main(["--list-passes"]) == 0
    text = capsys.readouterr().out
    assert "\nfuse-epilogue{bias=true,act=true,residual=true}  [graph -> graph]\n    Adds the bias, applies" in text
    assert "\nplan-memory  [sched -> buf]\n" in text and "\n@cpu\n    import-clean,fold,cse," in text
    assert main(["--help-pass", "fuse-add-norm"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("fuse-add-norm  [graph -> graph]\n\nComputes a residual sum while its norm reads it.\n")
    assert "after:   %y, %s = nn.add_rms_norm(" in text and "\nno options\n" in text


def test_reports_and_timelines(file: str) -> None:
    assert main([file, "-p", "@cpu", "--report", "r.html", "--timeline", "t.json"]) == 0
    assert Path("r.html").read_text().lower().startswith("<!doctype html>")
    assert json.loads(Path("t.json").read_text())["traceEvents"]


@pytest.mark.parametrize(
    ("argv", "message", "help"),
    [
        ([], "no file is given", "xllm-opt FILE.xir, or - for standard input"),
        (["m.xi"], "there is no file m.xi", "did you mean m.xir?"),
        (["m.xir", "--pint-changed"], "xllm-opt has no flag --pint-changed", "did you mean --print-changed?"),
        (["m.xir", "-x"], "xllm-opt has no flag -x", "xllm-opt --help lists them"),
        (["m.xir", "-p", "fuse-gul"], "there is no pass called 'fuse-gul'", "did you mean 'fuse-glu'?"),
        (["m.xir", "-p", "@cup"], "there is no preset called @cup", "did you mean '@cpu'?"),
        (
            ["m.xir", "-p", "fuse-epilogue{bais=true}"],
            "pass fuse-epilogue has no option 'bais'",
            "did you mean 'bias'?",
        ),
        (["--help-pass", "dec"], "there is no pass called 'dec'", "did you mean 'dce'?"),
        (
            ["m.xir", "-p", "dce,cse", "--print-after", "dec"],
            "--print-after: the pipeline has no pass 'dec'",
            "did you mean 'dce'?",
        ),
        (
            ["m.xir", "-p", "fuse-add-norm", "--explain", "fuse-ad-norm/x@h"],
            "--explain: the pipeline has no pass 'fuse-ad-norm'",
            "did you mean 'fuse-add-norm'?",
        ),
        (
            ["m.xir", "-p", "fuse-add-norm", "--explain", "fuse-add-norm/ad-norm@h"],
            "--explain fuse-add-norm/ad-norm@h: no such rule was tried in this run",
            "did you mean 'fuse-add-norm/add-norm'?",
        ),
        (
            ["m.xir", "-p", "fuse-add-norm", "--explain", "add-norm@ut"],
            "--explain add-norm@ut: no op defines %ut",
            "did you mean %out?",
        ),
        (
            ["m.xir", "-p", "dce", "--explain", "dce", "--report", "x.html"],
            "'dce' explains nothing",
            "write PASS/RULE@VALUE, such as fuse-glu@y",
        ),
        (["m.xir", "--remarks=("], "--remarks: '(' is not a regular expression", ""),
        (["m.xir", "--fuel", "-1"], "argument --fuel: '-1' is not a whole number", "xllm-opt --help tells"),
        (["m.xir", "--fuel"], "argument --fuel: expected one argument", "xllm-opt --help tells"),
        (["m.xir", "--interp", "N"], "--interp: 'N' is not a size", "write SYMBOL=NUMBER, such as N=3"),
        (["m.xir", "--interp", "M=1"], "--interp: the module has no size M", "its sizes: N"),
        (["m.xir", "--interp", "N=65"], "--interp: N=65 is outside [1, 64]", ""),
        (["m.xir", "--check-equiv=N=0"], "--check-equiv: N=0 is outside [1, 64]", ""),
        (["m.xir", "--load", "nothing.py"], "cannot read passes", "at nothing.py"),
        (["m.xir", "a.xir"], "unrecognized arguments: a.xir", ""),
        (["m.xir", "--report", "no/r.html"], "--report: there is no directory for no/r.html", "at no"),
        (["m.xir", "--remarks-json", "no/r"], "--remarks-json: there is no directory for no/r", "at no"),
        (["m.xir", "-o", "no/such/dir/x"], "cannot write no/such/dir/x: No such file or directory", ""),
        (["m.xir", "-p", "plan-memory"], "pass plan-memory needs stage sched, but would get graph", ""),
    ],
)
def test_what_is_not_there_is_named(file: str, argv: list[str], message: str, help: str, capsys: Capture) -> None:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" or "-o" in argv
    assert err.startswith("error[") and message in err.splitlines()[0]
    assert help in err and "Traceback" not in err
    assert not Path("xllm-repro.xir").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x7fELF\0\0", "error[io]: bad.xir is a binary file, not text\n  at byte 4\n"),
        (b"xir 1\n\xff\xfe", "error[io]: bad.xir is not UTF-8 text: invalid start byte\n  at bad.xir:2, byte 6\n"),
        (
            b"xir 1 stage=graph\nfunc @f(%x: f32[8]) -> (f32[8]) {\n  %y = t.neg(%z) : f32[8]\n",
            "error[ir]: %z is not defined before this use\n  at bad.xir:3:14\n"
            "      %y = t.neg(%z) : f32[8]\n                 ^^\n",
        ),
        (b"", "error[ir]: expected 'xir', found 'the end'\n  at bad.xir:1:1\n    \n    ^\n"),
    ],
)
def test_files_that_are_no_modules(content: bytes, message: str, file: str, capsys: Capture) -> None:
    Path("bad.xir").write_bytes(content)
    assert main(["bad.xir"]) == 2
    assert capsys.readouterr() == ("", message)
    assert main(["."]) == 2
    assert capsys.readouterr().err == "error[io]: . is a directory, not a file\n"


def test_windows_line_ends_and_a_byte_order_mark(file: str, capsys: Capture) -> None:
    Path("w.xir").write_bytes(b"\xef\xbb\xbf" + SUM_NORM.replace("\n", "\r\n").encode())
    assert main(["w.xir"]) == 0
    assert capsys.readouterr().out == SUM_NORM
