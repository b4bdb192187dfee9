"""The pytest plugin in other projects: collection, reports, --bless, passes of their own, laws, and silence."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import xllm_compiler.testing.filetest  # before pytester snapshots sys.modules
import xllm_compiler.tools.opt_job
from xllm_compiler.passes.registry import BUILTIN

pytest_plugins = ["pytester"]

PASS = (Path(__file__).parent / "lab_passes.py").read_text()
MODULE = """xir 1 stage=graph
dim N in [1, 64]

func @f(%x: f32[N, 8]) -> (f32[N, 8]) {
  %minus = t.neg(%x) : f32[N, 8]
  %y = t.exp(%minus) : f32[N, 8]
  return %y
}
"""
GOOD = "// RUN: xllm-opt %s -p dce | filecheck %s\n// CHECK: t.neg(%x)\n" + MODULE
BAD = "// RUN: xllm-opt %s -p dce | filecheck %s\n// CHECK: t.sin(%x)\n" + MODULE


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    """A project with a good and a bad file test, one with a misspelt directive, and a plain module."""
    pytester.makefile(".xir", good=GOOD, bad=BAD, misspelt=GOOD.replace("CHECK:", "CHEKC:"), plain=MODULE)
    return pytester


def test_files_with_directives_are_collected(project: pytest.Pytester) -> None:
    result = project.runpytest_inprocess("--collect-only", "-q")
    result.stdout.fnmatch_lines(["bad.xir::RUN-1", "good.xir::RUN-1", "misspelt.xir::directives"])
    result.stdout.no_fnmatch_line("*plain*")
    result.stdout.no_fnmatch_line("*laws*")


def test_reports_show_the_file_and_no_traceback(project: pytest.Pytester) -> None:
    result = project.runpytest_inprocess()
    result.assert_outcomes(passed=1, failed=2)
    result.stdout.fnmatch_lines(
        [
            "*_ bad.xir RUN-1 _*",
            "bad.xir:2: CHECK: t.sin(%x)",
            "  is not in the output",
            "most like it",
            "     5 |   %minus = t.neg(%x) : f32[[]N, 8]",
            "RUN: xllm-opt %s -p dce | filecheck %s",
            "in   bad.xir:1",
            "*_ misspelt.xir directives _*",
            "error[[]ir]: CHEKC is no directive",
            "  at misspelt.xir:2:4",
            "  help: did you mean CHECK:",
        ]
    )
    for part in ("Traceback", "plugin.py", "def runtest"):
        result.stdout.no_fnmatch_line(f"*{part}*")


def test_choosing(project: pytest.Pytester) -> None:
    project.runpytest_inprocess("-k", "good").assert_outcomes(passed=1, deselected=2)
    project.runpytest_inprocess("-x").assert_outcomes(failed=1)
    project.runpytest_inprocess("good.xir::RUN-1").assert_outcomes(passed=1)
    project.runpytest_inprocess("--lf").assert_outcomes(failed=1)


def test_every_run_line_is_an_item(pytester: pytest.Pytester) -> None:
    pytester.makefile(".xir", two=BAD.replace("// CHECK", "// RUN: xllm-opt %s | filecheck %s\n// CHECK"))
    result = pytester.runpytest_inprocess("-v")
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(["two.xir::RUN-1 FAILED*", "two.xir::RUN-2 FAILED*"])


def test_blessing(pytester: pytest.Pytester) -> None:
    pytester.makefile(".xir", a="// RUN: xllm-opt %s -p dce | filecheck %s\n// BLESS\n" + MODULE)
    result = pytester.runpytest_inprocess()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["a.xir:2: no CHECK lines follow BLESS: run pytest --bless*"])
    pytester.runpytest_inprocess("--bless").assert_outcomes(passed=1)
    assert "// BLESS\n// CHECK: func @f" in (pytester.path / "a.xir").read_text()
    pytester.runpytest_inprocess().assert_outcomes(passed=1)


def test_another_rootdir(project: pytest.Pytester, tmp_path: Path) -> None:
    result = project.runpytest_inprocess("--rootdir", str(tmp_path), str(project.path / "good.xir"))
    result.assert_outcomes(passed=1)


# ----------------------------------------------------------------------------------------------------- passes and laws


@pytest.fixture
def laws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two quick laws in place of ours: what a law is, is not the plugin's."""
    stub = ModuleType("xllm_compiler.testing.laws")
    vars(stub)["law_names"] = lambda: ["meaning", "honesty"]

    def check(name: str, law: str, folders: tuple[Path, ...], preset: str) -> str | None:
        return f"{name} breaks {law} in {[*map(str, folders)]}" if (name, law) == ("lab-wrong", "meaning") else None

    vars(stub)["check"] = check
    vars(stub)["tally"] = lambda name, folders, preset: f"{name}: 3 of 4 modules changed"
    monkeypatch.setitem(sys.modules, "xllm_compiler.testing.laws", stub)
    monkeypatch.setattr("xllm_compiler.testing.laws", stub, raising=False)


@pytest.fixture
def with_passes(pytester: pytest.Pytester, laws: None) -> pytest.Pytester:
    """A project with passes of its own in a file, and a test of one."""
    pytester.makepyprojecttoml('[tool.pytest.ini_options]\nxllm_passes = ["more/lab_passes.py"]\n')
    pytester.mkdir("more")
    (pytester.path / "more" / "lab_passes.py").write_text(PASS)
    pytester.makefile(".xir", wrong="// RUN: xllm-opt %s -p lab-wrong | filecheck %s\n// CHECK: t.abs\n" + MODULE)
    return pytester


def test_passes_of_the_ini_are_known_and_held_to_the_laws(with_passes: pytest.Pytester) -> None:
    result = with_passes.runpytest_inprocess("-v")
    result.assert_outcomes(passed=8, failed=1)
    result.stdout.fnmatch_lines(
        [
            "wrong.xir::RUN-1 PASSED*",
            "laws::lab-wrong::meaning FAILED*",
            "laws::lab-wrong::honesty PASSED*",
            "*laws::lab-crash::honesty PASSED*",
            "lab-wrong breaks meaning in [[]'.'[]]",
        ]
    )
    result.stdout.no_fnmatch_line("*Traceback*")


def test_laws_are_asked_for_or_belong_to_the_whole_run(with_passes: pytest.Pytester) -> None:
    with_passes.runpytest_inprocess("wrong.xir").assert_outcomes(passed=1)
    with_passes.runpytest_inprocess("--bless").assert_outcomes(passed=1)
    with_passes.runpytest_inprocess("wrong.xir", "--laws").assert_outcomes(passed=8, failed=1)
    with_passes.runpytest_inprocess("wrong.xir", "--laws=lab-wrong").assert_outcomes(passed=2, failed=1)
    with_passes.runpytest_inprocess("wrong.xir", "--laws=fuse-glu").assert_outcomes(passed=3)
    with_passes.runpytest_inprocess("-k", "lab-wrong and honesty").assert_outcomes(passed=1, deselected=8)
    with_passes.runpytest_inprocess("-m", "not laws", "--strict-markers").assert_outcomes(passed=1, deselected=8)
    result = with_passes.runpytest_inprocess("wrong.xir", "--laws=lab-wrogn")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: --laws=lab-wrogn*", "*there is no pass called*", "*did you mean 'lab-wrong'*"])
    for preset in ("@abacus", "cpu"):
        result = with_passes.runpytest_inprocess("wrong.xir", "--laws=lab-wrong", f"--laws-preset={preset}")
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        result.stderr.fnmatch_lines([f"ERROR: --laws-preset={preset}: no installed target*", "*@cpu, @cpu-int4*"])


def test_passes_are_tried_on_the_modules_of_the_project(with_passes: pytest.Pytester) -> None:
    ini = with_passes.path / "pyproject.toml"
    for folder in ("a", "b/c"):
        (with_passes.path / folder).mkdir(parents=True)
        (with_passes.path / folder / "t.xir").write_text(GOOD)
    only = ("--laws=lab-wrong", "-k", "meaning")
    result = with_passes.runpytest_inprocess("a", "b", *only)
    result.stdout.fnmatch_lines(["lab-wrong breaks meaning in [[]'a', 'b/c'[]]"])
    text = ini.read_text()
    for paths, folders in (('"b"', "'b'"), ('"."', "'.'"), ('"b/*", "a"', "'b/c', 'a'")):
        ini.write_text(f"{text}\ntestpaths = [{paths}]\n")
        result = with_passes.runpytest_inprocess("a", *only)
        result.stdout.fnmatch_lines([f"lab-wrong breaks meaning in [[]{folders}[]]"])


def test_all_of_our_own(pytester: pytest.Pytester, laws: None) -> None:
    pytester.makeini("[pytest]\nxllm_passes = xllm_compiler.passes\n")
    result = pytester.runpytest_inprocess("--collect-only", "-q")
    lines = [line for line in result.outlines if line.startswith("laws::")]
    assert lines == [f"laws::{name}::{law}" for name in BUILTIN for law in ("meaning", "honesty")]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("more/missing.py", "*cannot read passes: No such file*"),
        ("no_such_module", "*cannot load passes from module no_such_module: ModuleNotFoundError*"),
        ("json", "*json registers no pass*"),
    ],
)
def test_passes_that_cannot_be_loaded(pytester: pytest.Pytester, spec: str, says: str) -> None:
    pytester.makeini(f"[pytest]\nxllm_passes = {spec}\n")
    pytester.makefile(".xir", good=GOOD)
    result = pytester.runpytest_inprocess()
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: xllm_passes: {spec}", says])


# -------------------------------------------------------------------------------------------------------------- silence


def test_a_project_that_is_not_about_passes_imports_nothing(tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text(
        "import sys\n\ndef test_a():\n    ours = [m for m in sys.modules if m.startswith('xllm_compiler')]\n"
        "    assert ours == ['xllm_compiler', 'xllm_compiler.testing', 'xllm_compiler.testing.plugin'], ours\n"
        "    assert 'numpy' not in sys.modules\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:hypothesispytest", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("package", "place"), [("pytest", "plugin.py"), ("filecheck", "filecheck.py")])
def test_what_only_tests_need_is_imported_in_one_place(package: str, place: str) -> None:
    """So that the tools work where neither is installed."""
    root = Path(xllm_compiler.__file__).parent
    found = [
        path.name
        for folder in (root, *(root / name for name in ("passes", "runtime", "kernels", "models")))
        for path in sorted(folder.rglob("*.py"))
        if re.search(rf"^\s*(?:import|from) {package}\b", path.read_text(), re.MULTILINE)
    ]
    assert found == [place]
