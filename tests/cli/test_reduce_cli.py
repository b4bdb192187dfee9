"""`xllm-reduce`: what it writes shows the failure again, and every way of asking for nothing is one clear error."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from xllm_compiler.ir.parser import parse_module
from xllm_compiler.testing import failures
from xllm_compiler.testing.corpus import TRACED
from xllm_compiler.tools.opt import main as opt
from xllm_compiler.tools.reduce import main

PLANTED = str(Path(__file__).parents[1] / "testing" / "planted_passes.py")
QWEN3 = str(TRACED / "qwen3.xir")
SMALL = "xir 1 stage=graph\nfunc @f(%x: f32[4]) -> (f32[4]) {\n  %y = t.neg(%x) : f32[4]\n  return %y\n}\n"

Capture = pytest.CaptureFixture[str]
pytestmark = pytest.mark.usefixtures("own_registry")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.xir").write_text(SMALL)
    return tmp_path


def error(capsys: Capture, argv: list[str], code: int = 2) -> str:
    assert main(argv) == code
    out, err = capsys.readouterr()
    assert out == ""
    return err


def test_the_result_has_a_run_line_that_shows_the_failure(here: Path, capsys: Capture) -> None:
    assert main([QWEN3, "-p", "cse,shuffle,dce", "--load", PLANTED, "-o", "out.xir"]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "@step does not compute what it did" in err and "200 ops -> 2 ops, " in err
    assert "   199 ops left," not in err and " ops left, " in err
    run, fails, origin, *_ = text = (here / "out.xir").read_text().splitlines()
    assert run == f"// RUN: xllm-opt %s -p cse,shuffle,dce --load {PLANTED} --check-equiv=N=1"
    assert fails.startswith("// Fails: @step does not compute what it did: return 0, %")
    assert origin == f"// Reduced from {QWEN3}, 200 ops."
    assert len(text) == 11
    words = shlex.split(run.removeprefix("// RUN: xllm-opt ").replace("%s", "out.xir"))
    assert opt(words) == 1
    assert "@step does not compute what it did" in capsys.readouterr().err


def test_a_raising_pass_and_standard_output(here: Path, capsys: Capture) -> None:
    assert main([QWEN3, "-p", "stumble", "--load", PLANTED, "--check", "error"]) == 0
    out, _ = capsys.readouterr()
    assert out.splitlines()[:2] == [
        f"// RUN: xllm-opt %s -p stumble --load {PLANTED} --no-verify-each",
        "// Fails: error[internal]: pass stumble failed: KeyError: 'silu'",
    ]
    assert [op.name for op in parse_module(out).func().ops] == ["kv.attend", "t.silu", "t.mul"]


def test_what_a_pass_goes_by_is_kept_even_if_it_is_a_source_line(here: Path, capsys: Capture) -> None:
    """Source lines and lineage are left out of the result, unless a pass that reads them needs them to fail."""
    (here / "mine.py").write_text(
        '''"""A pass that goes by lines."""
from dataclasses import dataclass
from xllm_compiler.passes.base import FuncPass
from xllm_compiler.passes.registry import register_pass


@register_pass("by-line")
@dataclass(frozen=True)
class ByLine(FuncPass):
    """Raises."""

    def run_on(self, func, ctx):
        for op in func.ops:
            if op.loc.module_path == "model.mlp":
                raise ValueError("mlp")
        return False
'''
    )
    text = SMALL.replace("f32[4]\n  return", 'f32[4] loc("a.py":3, "model.mlp")\n  return')
    (here / "loc.xir").write_text(text)
    assert main(["loc.xir", "-p", "by-line", "--load", "mine.py", "-o", "out.xir"]) == 0
    assert 't.neg(%x) : f32[1] loc("a.py":3, "model.mlp")' in (here / "out.xir").read_text()
    assert main([QWEN3, "-p", "liar", "--load", PLANTED, "-o", "out.xir"]) == 0
    assert "loc(" not in (here / "out.xir").read_text()


def test_a_command_decides(here: Path, capsys: Capture) -> None:
    """As a script for other reducers does, grep says 0 for what is interesting. No shell: no quotes are left."""
    assert main([QWEN3, "--test", "grep -qw 'kv.attend'", "--interesting-exit", "0"]) == 0
    out, _ = capsys.readouterr()
    assert out.splitlines()[0] == "// RUN: grep -qw kv.attend %s"
    assert [op.name for op in parse_module(out).func().ops] == ["kv.attend"]


def test_any_exit_code_but_zero_is_a_failure(here: Path, capsys: Capture) -> None:
    (here / "test it.py").write_text("import sys; sys.exit(5 if 't.neg' in open(sys.argv[1]).read() else 0)")
    test = shlex.join([sys.executable, "test it.py", "%s", "more"])
    assert main(["small.xir", "--test", test]) == 0
    assert "t.neg(%x) : f32[1]" in capsys.readouterr().out


def test_sizes_are_those_asked_for(here: Path, capsys: Capture) -> None:
    argv = [QWEN3, "-p", "lose-write", "--load", PLANTED, "--sizes", "N=4;B=2", "--seed", "3", "-o", "out.xir"]
    assert main(argv) == 0
    run = (here / "out.xir").read_text().splitlines()[0]
    assert run.endswith("--check-equiv=N=4,B=2 --seed 3")
    capsys.readouterr()
    assert opt(shlex.split(run.removeprefix("// RUN: xllm-opt ").replace("%s", "out.xir"))) == 1


def test_time_is_up(here: Path, capsys: Capture) -> None:
    assert main([QWEN3, "-p", "liar", "--load", PLANTED, "--time-limit", "0", "-o", "out.xir"]) == 0
    assert capsys.readouterr().err.endswith(
        "200 ops -> 200 ops, 0 candidates\nnote: time is up; it may get smaller still\n"
    )
    assert len(parse_module((here / "out.xir").read_text()).func().ops) == 200


def test_an_interrupt_keeps_what_has_been_reached(here: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 0
    shows = failures.PipelineCheck.shows

    def interrupted(self: failures.PipelineCheck, *rest: object) -> bool:
        nonlocal count
        count += 1
        if count == 12:
            raise KeyboardInterrupt
        return shows(self, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(failures.PipelineCheck, "shows", interrupted)
    assert main([QWEN3, "-p", "liar", "--load", PLANTED, "-o", "out.xir"]) == 130
    assert "note: interrupted; it may get smaller still" in capsys.readouterr().err
    assert 1 < len(parse_module((here / "out.xir").read_text()).func().ops) < 200


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["small.xir"], "give either -p PIPELINE or --test CMD"),
        (["small.xir", "-p", "dce", "--test", "true"], "give either -p PIPELINE or --test CMD"),
        (["small.xir", "-p", "dce"], "there is nothing to reduce: dce does nothing wrong that --check equiv sees"),
        (["small.xir", "-p", "dcee"], "there is no pass called 'dcee'"),
        (["small.xir", "-p", "plan-memory", "--check", "equal"], "invalid choice: 'equal'"),
        (["small.xir", "-p", "dce", "--sizes", "M=3"], "the module has no size M"),
        (["small.xir", "--test", "true", "--sizes", "M=3"], "--sizes and --test exclude each other"),
        (
            ["small.xir", "-p", "dce", "--interesting-exit", "1"],
            "--interesting-exit is the exit code of a --test command",
        ),
        (["small.xir", "--test", "no-such-program %s"], "the command cannot be run: no-such-program: No such file"),
        (["small.xir", "--test", "./small.xir"], "the command cannot be run: ./small.xir: Permission denied"),
        (["small.xir", "--test", "true"], "there is nothing to reduce: the command's exit code is 0"),
        (["small.xir", "--test", "true", "--interesting-exit", "4"], "the command's exit code is not 4"),
        (["small.xir", "--test", "tail -f", "--test-timeout", "1"], "or it takes too long"),
        (["smal.xir", "-p", "dce"], "there is no file smal.xir"),
        (["small.xir", "-p", "dce", "-o", "no/out.xir"], "cannot write no/out.xir: there is no directory no"),
        (["small.xir", "-p", "dce", "-o", "."], "cannot write .: it is a directory"),
        (["small.xir", "-p", "dce", "--load", "nothing.py"], "cannot read passes: No such file or directory"),
        (["small.xir", "-p", "dce", "--time", "3"], "xllm-reduce has no flag --time"),
        (["bad.xir", "-p", "dce"], "expected"),
        (["wrong.xir", "-p", "dce"], "V1"),
    ],
)
def test_bad_input_is_one_error(here: Path, capsys: Capture, argv: list[str], message: str) -> None:
    (here / "bad.xir").write_text("xir 1 stage=graph\nfunc @f(%x f32[4])\n")
    (here / "wrong.xir").write_text(SMALL.replace("t.neg(%x)", "t.neg(%z)"))
    err = error(capsys, argv)
    assert err.startswith("error[") and err.count("error[") == 1 and "Traceback" not in err
    assert message in err or (message == "V1" and "%z" in err), err
