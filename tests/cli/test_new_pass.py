"""`xllm-new-pass`: what it writes works at once and is clean; what it refuses to write; pytest's settings."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from xllm_compiler.passes.registry import load_passes
from xllm_compiler.testing.filetest import run_file_test
from xllm_compiler.tools.new_pass import main
from xllm_compiler.tools.opt import main as opt

ROOT = Path(__file__).resolve().parents[2]
FILES = [
    "drop_pairs.py",
    "pytest.ini",
    "tests/passes/drop-pairs/error.xir",
    "tests/passes/drop-pairs/fires.xir",
    "tests/passes/drop-pairs/unchanged.xir",
]

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def call(*argv: str, cwd: Path, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *argv], cwd=cwd, capture_output=True, text=True, env={**os.environ, **env}, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_what_is_written_and_said(folder: Path, capsys: Capture) -> None:
    assert main(["drop-pairs"]) == 0
    assert written(folder) == FILES
    assert (folder / "pytest.ini").read_text() == "[pytest]\ntestpaths = tests\nxllm_passes =\n    drop_pairs.py\n"
    assert capsys.readouterr().out == (
        "wrote drop_pairs.py\n"
        "wrote tests/passes/drop-pairs/fires.xir\n"
        "wrote tests/passes/drop-pairs/unchanged.xir\n"
        "wrote tests/passes/drop-pairs/error.xir\n"
        "wrote pytest.ini\n"
        "\n"
        "next:\n"
        "  pytest    # the tests, and the laws that every pass must keep\n"
        "  xllm-opt tests/passes/drop-pairs/fires.xir --load drop_pairs.py -p drop-pairs --diff\n"
        "  then change drop_pairs.py into what you want, and the tests with it\n"
    )


@pytest.mark.usefixtures("own_registry")
def test_the_pass_works_and_its_tests_hold(folder: Path, capsys: Capture) -> None:
    assert main(["drop-pairs"]) == 0
    assert load_passes("drop_pairs.py") == ["drop-pairs"]
    for case in ("fires", "unchanged", "error"):
        assert run_file_test(f"tests/passes/drop-pairs/{case}.xir") == []
    capsys.readouterr()
    fires = "tests/passes/drop-pairs/fires.xir"
    assert opt([fires, "--load", "drop_pairs.py", "-p", "drop-pairs", "--stats"]) == 0
    out, err = capsys.readouterr()
    assert "t.neg" not in out and err == "drop-pairs: dead-ops 1, double-neg 1\n"
    assert opt([fires, "--load", "drop_pairs.py", "-p", "drop-pairs{min_rank=3}", "--remarks"]) == 0
    out, err = capsys.readouterr()
    assert out.count("t.neg") == 2
    assert err == f"remark: drop-pairs: has less than 3 axes; left alone [%b = t.neg, {fires}:14]\n"


@pytest.mark.usefixtures("own_registry")
def test_its_tests_notice_when_the_pass_stops_working(folder: Path) -> None:
    assert main(["drop-pairs"]) == 0
    text = Path("drop_pairs.py").read_text()
    Path("drop_pairs.py").write_text(text.replace("if not isinstance(inner, Neg):", "if True:"))
    load_passes("drop_pairs.py")
    assert "CHECK" in str(run_file_test("tests/passes/drop-pairs/fires.xir")[0])


def test_pytest_finds_it_in_a_foreign_directory(folder: Path) -> None:
    assert main(["drop-pairs"]) == 0
    text = call("pytest", "tests", "-q", "-p", "no:cacheprovider", cwd=folder)
    assert "3 passed" in text


@pytest.mark.slow
def test_the_laws_hold(folder: Path) -> None:
    assert main(["drop-pairs"]) == 0
    assert "laws::drop-pairs" in call("pytest", "-v", "-p", "no:cacheprovider", cwd=folder)


def test_what_is_written_is_clean(folder: Path) -> None:
    assert main(["drop-pairs"]) == 0
    call("ruff", "check", "--isolated", "--select", "E,F,I,UP,B,SIM,RUF", ".", cwd=folder)
    call("ruff", "format", "--isolated", "--check", ".", cwd=folder)


@pytest.mark.slow
def test_what_is_written_is_typed(folder: Path) -> None:
    assert main(["drop-pairs"]) == 0
    call("mypy", "--strict", "drop_pairs.py", cwd=folder, MYPYPATH=str(ROOT))


def test_nothing_is_ever_overwritten(folder: Path, capsys: Capture) -> None:
    mine = folder / "tests" / "passes" / "drop-pairs" / "unchanged.xir"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    assert main(["drop-pairs"]) == 2
    assert written(folder) == ["tests/passes/drop-pairs/unchanged.xir"] and mine.read_text() == "mine"
    assert capsys.readouterr().err == (
        "error[io]: already there: tests/passes/drop-pairs/unchanged.xir\n"
        "  help: nothing was written; choose another name, or remove what is in the way\n"
    )


@pytest.mark.parametrize(
    ("config", "text", "said"),
    [
        ("pytest.ini", "[pytest]\n", ["add to [pytest] in {}:", "    xllm_passes = sub/drop_pairs.py"]),
        (
            "pytest.ini",
            "[pytest]\nxllm_passes =\n    other.py\n",
            ["add to the list xllm_passes in {}:", "    sub/drop_pairs.py"],
        ),
        (
            "pyproject.toml",
            "[tool.pytest.ini_options]\n",
            ["add to [tool.pytest.ini_options] in {}:", '    xllm_passes = ["sub/drop_pairs.py"]'],
        ),
        (
            "pyproject.toml",
            '[tool.pytest.ini_options]\nxllm_passes = ["x"]\n',
            ["add to the list xllm_passes in {}:", '    "sub/drop_pairs.py",'],
        ),
        ("setup.cfg", "[tool:pytest]\n", ["add to [tool:pytest] in {}:", "    xllm_passes = sub/drop_pairs.py"]),
        ("tox.ini", "[pytest]\n", ["add to [pytest] in {}:", "    xllm_passes = sub/drop_pairs.py"]),
    ],
)
def test_settings_that_exist_are_not_touched(
    folder: Path, config: str, text: str, said: list[str], capsys: Capture
) -> None:
    (folder / "sub").mkdir()
    (folder / config).write_text(text)
    assert main(["drop-pairs", "--dir", "sub"]) == 0
    assert (folder / config).read_text() == text and not (folder / "sub" / "pytest.ini").exists()
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("next:")
    assert lines[at + 1 : at + 4] == [
        *(f"  {line.format(folder / config)}" for line in said),
        "  cd sub && pytest    # the tests, and the laws that every pass must keep",
    ]


@pytest.mark.parametrize(("config", "text"), [("pyproject.toml", "[project]\n"), ("tox.ini", "[tox]\n")])
def test_a_config_without_pytest_does_not_count(folder: Path, config: str, text: str) -> None:
    (folder / config).write_text(text)
    assert main(["drop-pairs"]) == 0
    assert (folder / "pytest.ini").exists()


@pytest.mark.parametrize(
    ("name", "message", "help"),
    [
        ("drop_pairs", "'drop_pairs' is not a pass name: lower case, words joined by -", "did you mean drop-pairs?"),
        ("DropPairs", "'DropPairs' is not a pass name: lower case, words joined by -", "did you mean drop-pairs?"),
        ("../x", "'../x' is not a pass name: lower case, words joined by -", "did you mean x?"),
        ("9", "'9' is not a pass name: lower case, words joined by -", "such as fuse-norm"),
        ("x" * 61, f"{'x' * 61!r} is not a pass name: lower case, words joined by -", f"did you mean {'x' * 60}?"),
        ("json", "'json' is taken by Python itself", "say what it does to what, such as json-norm"),
        ("class", "'class' is taken by Python itself", "say what it does to what, such as class-norm"),
        ("fix", "'fix' is a word of the pipeline syntax", "say what it does to what, such as fix-norm"),
        ("dce", "there is a pass called 'dce'", "xllm-opt --help-pass dce tells of it"),
    ],
)
def test_names_that_are_refused(folder: Path, name: str, message: str, help: str, capsys: Capture) -> None:
    assert main([name]) == 2
    assert capsys.readouterr().err == f"error[option]: {message}\n  help: {help}\n"
    assert written(folder) == []


def test_a_directory_that_is_not_there(folder: Path, capsys: Capture) -> None:
    assert main(["drop-pairs", "--dir", "nowhere"]) == 2
    assert capsys.readouterr().err == "error[io]: there is no directory nowhere\n  help: make it first\n"
