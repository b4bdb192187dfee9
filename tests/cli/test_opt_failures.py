"""`xllm-opt` when a pass is wrong: what is said, the repro file, and that its command shows the same again."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from xllm_compiler.tools.opt import main

MODULE = """\
xir 1 stage=graph
dim N in [1, 64]

func @f(%x: f32[N, 8]) -> (f32[N, 8]) {
  %a = t.neg(%x) : f32[N, 8]
  %unused = t.exp(%a) : f32[N, 8]
  %y = t.silu(%a) : f32[N, 8]
  return %y
}
"""
AFTER_DCE = MODULE.replace("  %unused = t.exp(%a) : f32[N, 8]\n", "")

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("m.xir").write_text(MODULE)


def without_locs(text: str) -> str:
    return "\n".join(line.partition(" loc(")[0] for line in text.splitlines()) + "\n"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fault-raises", "error[internal]: pass fault-raises failed: KeyError: 'surprise'"),
        ("fault-breaks", "error[internal]: after pass fault-breaks: "),
        ("fault-lies", "error[internal]: pass fault-lies says it changed the module, which is as it was"),
    ],
)
def test_a_wrong_pass_leaves_its_input_and_a_command(faulty: str, name: str, message: str, capsys: Capture) -> None:
    assert main(["m.xir", "--load", faulty, "-p", f"dce,{name},cse"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(message) and "Traceback" not in err
    command = ["xllm-opt", "xllm-repro.xir", "-p", name, "--load", faulty]
    assert f"repro: {shlex.join(command)}\n" in err
    run, _, text = Path("xllm-repro.xir").read_text().partition("\n")
    assert run == f"// RUN: xllm-opt %s {shlex.join(command[2:])}"
    assert without_locs(text) == AFTER_DCE
    assert main([*command[1:], "--no-repro"]) == 1
    again = capsys.readouterr().err
    assert again.splitlines()[0] == err.splitlines()[0]


def test_the_repro_file_may_be_elsewhere_or_not_wanted(faulty: str) -> None:
    assert main(["m.xir", "--load", faulty, "-p", "fault-raises", "--repro", "other.xir"]) == 1
    assert Path("other.xir").read_text().startswith("// RUN: xllm-opt %s -p fault-raises")
    assert main(["m.xir", "--load", faulty, "-p", "fault-raises", "--no-repro"]) == 1
    assert not Path("xllm-repro.xir").exists()


def test_without_verify_each_the_end_is_still_verified(faulty: str, capsys: Capture) -> None:
    assert main(["m.xir", "--load", faulty, "-p", "fault-breaks", "--no-verify-each"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error[ir]: V") and "fault-breaks" not in err


def test_a_changed_meaning_is_told_with_the_command_that_narrows_it_down(faulty: str, capsys: Capture) -> None:
    argv = ["m.xir", "--load", faulty, "-p", "dce,fault-means"]
    assert main(argv) == 0
    capsys.readouterr()
    assert main([*argv, "--check-equiv=N=1,7"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error[internal]: ") and "@f" in err and "N=" in err
    assert f"xllm-bisect m.xir -p dce,fault-means --load {shlex.quote(faulty)}" in err


def test_rounding_is_forgiven_as_far_as_a_pass_declares(faulty: str, capsys: Capture) -> None:
    argv = ["m.xir", "--load", faulty, "--check-equiv=N=3", "-p"]
    assert main([*argv, "round-off"]) == 0
    assert main([*argv, "fault-rounds"]) == 1
    assert "@f" in capsys.readouterr().err


def test_passes_from_outside_are_listed(faulty: str, capsys: Capture) -> None:
    assert main(["--load", faulty, "--list-passes"]) == 0
    assert "\nfault-means  [graph -> graph]\n    Computes x + x for silu(x).\n" in capsys.readouterr().out
    assert main(["--load", faulty, "--help-pass", "fault-rounds"]) == 0
    text = capsys.readouterr().out
    assert "rounding: up to 12 units" in text and "a second run may change more" in text
    assert main(["m.xir", "--load", faulty, "-p", "fault-mean"]) == 2
    assert "did you mean 'fault-means'?" in capsys.readouterr().err


def test_loading_what_is_no_pass(capsys: Capture) -> None:
    Path("empty.py").write_text("")
    Path("broken.py").write_text("1 / 0\n")
    for spec, message in (
        ("empty.py", "empty.py registers no pass"),
        ("broken.py", "cannot load passes from broken.py: ZeroDivisionError: division by zero"),
        ("no_such_module", "cannot load passes from module no_such_module: ModuleNotFoundError"),
    ):
        assert main(["m.xir", "--load", spec]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "watch", [["--explain", "@y"], ["--explain", "@y", "--explain", "raising@y"], ["--report", "r"]]
)
def test_no_trace_function_is_left_behind(faulty: str, watch: list[str], capsys: Capture) -> None:
    """Rules are watched line by line with sys.settrace; whatever happens to them, that ends."""
    before = sys.gettrace()
    assert main(["m.xir", "--load", faulty, "-p", "fault-rule", "--no-repro", *watch]) == 1
    assert "ValueError: t.silu" in capsys.readouterr().err
    assert sys.gettrace() is before
    for fuel in ("0", "1"):
        assert main(["m.xir", "--load", faulty, "-p", "fault-means", "--fuel", fuel, *watch[:2]]) == 0
        err = capsys.readouterr().err
        if "--explain" in watch:
            said = "was not tried at %y = t.silu; --fuel was used up\n" if fuel == "0" else "at %y = t.silu: fired\n"
            assert err.startswith(f"fault-means/silu-twice {said}")
        assert sys.gettrace() is before


@pytest.mark.parametrize(
    ("options", "message", "help"),
    [
        ("", "pass with-options needs option 'depth'", "write with-options{depth=VALUE}"),
        ("{ratio=1}", "pass with-options needs option 'depth'", "write with-options{depth=VALUE}"),
        ("{depth=1,ratio=1e+17}", "pass with-options refuses its options: ratio is too large", ""),
        ("{dept=1}", "pass with-options has no option 'dept'", "did you mean 'depth'?"),
    ],
)
def test_options_of_a_pass_from_outside(faulty: str, options: str, message: str, help: str, capsys: Capture) -> None:
    assert main(["m.xir", "--load", faulty, "-p", f"with-options{options}"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error[option]: {message}\n") and help in err


def test_options_of_a_pass_from_outside_are_listed(faulty: str, capsys: Capture) -> None:
    assert main(["m.xir", "--load", faulty, "-p", "with-options{depth=1,ratio=1e+16}"]) == 0
    assert main(["--load", faulty, "--list-passes"]) == 0
    assert "\nwith-options{depth,ratio=0.5}  [graph -> graph]\n" in capsys.readouterr().out


def test_a_package_that_is_broken_does_not_hide_the_other_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    info = tmp_path / "broken-2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 2.0\n")
    offered = "[xllm_compiler.passes]\nfuse-broken = no_such_package.passes:Fuse\n"
    (info / "entry_points.txt").write_text(offered + "[xllm_compiler.targets]\nabacus = no_such_package:Abacus\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["--list-passes"]) == 0
    text = capsys.readouterr().out
    assert "\nfuse-broken\n    cannot be loaded: package broken 2.0 offers pass fuse-broken, which" in text
    assert "\n@abacus\n    cannot be loaded: package broken 2.0 offers target abacus, which" in text
    assert "\n@cpu\n    import-clean,fold" in text
    assert "\nfuse-glu  [graph -> graph]\n" in text
