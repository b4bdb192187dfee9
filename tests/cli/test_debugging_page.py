"""Every command of docs/debugging.md runs as it stands there, in order, and the dial does what its table says."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import shlex
import sys
from pathlib import Path

import pytest

from xllm_compiler.tools import console
from xllm_compiler.tools.opt import main as opt

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "debugging.md").read_text()
COMMANDS = re.findall(r"^    ((?:XLLM_DEBUG=\d )?xllm-[^#\n]*?)(?: +# exit code (\d))?$", PAGE, re.MULTILINE)
TORCH = ("xllm-trace", "xllm-compile")

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the files that the page shows."""
    monkeypatch.chdir(tmp_path)
    for name, text in re.findall(r"`(\w+\.\w+)`[^`\n]*:\n\n((?:    .*\n|\n(?=    |\n))+)", PAGE):
        Path(name).write_text(re.sub("^    ", "", text, flags=re.MULTILINE))
    Path("models").symlink_to(ROOT / "models")
    return tmp_path


def run(command: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of the last command of a pipe, run in this process."""
    given, code = "", 0
    for part in command.split("|"):
        words = shlex.split(part)
        monkeypatch.delenv("XLLM_DEBUG", raising=False)
        if words[0].startswith("XLLM_DEBUG="):
            monkeypatch.setenv(*words.pop(0).split("="))
        main = importlib.import_module(f"xllm_compiler.tools.{words[0].removeprefix('xllm-').replace('-', '_')}").main
        monkeypatch.setattr(sys, "stdin", io.StringIO(given))
        with contextlib.redirect_stdout(io.StringIO()) as out:
            code = main(words[1:])
        given = out.getvalue()
    return code


def test_the_page_shows_every_tool() -> None:
    scripts = re.findall(r"^(xllm-\S+) = ", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    shown = {re.sub(r"XLLM_DEBUG=\d ", "", command).split()[0] for command, _ in COMMANDS}
    assert shown == set(scripts) - {"xllm-serve"}
    assert len(COMMANDS) == len(re.findall(r"^    (?:XLLM_DEBUG=\d )?xllm-", PAGE, re.MULTILINE)) == 15


@pytest.mark.usefixtures("own_registry")
def test_every_command_that_needs_no_torch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sorted(p.name for p in folder.iterdir()) == ["example.xir", "models", "wrong.py"]
    for command, code in COMMANDS:
        if not any(tool in command for tool in TORCH):
            assert run(command, monkeypatch) == int(code or 0), command
    made = {"planned.xir", "report.html", "timeline.json", "small.xir", "drop_pairs.py", "pytest.ini"}
    assert made <= {p.name for p in folder.iterdir()}
    assert not (folder / "xllm-dump").exists() and not (folder / "xllm-repro.xir").exists()


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c, _ in COMMANDS if any(tool in c for tool in TORCH)])
def test_every_command_that_traces(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(command, monkeypatch) == 0


@pytest.mark.parametrize("level", ["", "0", "1", "2", "3", "4"])
def test_each_level_shows_more(level: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("XLLM_DEBUG", level)
    number = int(level or 0)
    assert console.debug_level() == number
    assert opt(["example.xir", "-p", "fuse-add-norm,dce", "-o", "out.xir"]) == 0
    err = capsys.readouterr().err
    assert err.count("// ---- after 01 fuse-add-norm\n@@") == (number >= 3)
    assert len(re.findall(r"^0[12] \S+ +(?:changed|-) ", err, re.MULTILINE)) == (2 if number >= 2 else 0)
    assert (err == "") == (number < 2)
    dumped = ["00-input.xir", "01-fuse-add-norm.xir", "02-dce.xir", "passes.txt"] if number == 4 else []
    assert sorted(p.name for p in Path("xllm-dump").glob("*")) == dumped
    assert opt(["no.xir"]) == 2
    assert ("Traceback" in capsys.readouterr().err) == (number >= 1)


@pytest.mark.parametrize("level", ["5", "-1", "yes", "01", " 1", "1.0"])
def test_a_bad_level_is_an_error(level: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("XLLM_DEBUG", level)
    assert opt(["--list-passes"]) == 2
    assert capsys.readouterr() == (
        "",
        f"error[option]: XLLM_DEBUG={level} is not a level\n  help: give a number from 0 to 4\n",
    )


def test_the_table_has_every_level() -> None:
    assert re.findall(r"^\| (\d)", PAGE, re.MULTILINE) == [str(n) for n in range(console.MAX_DEBUG + 1)]
    assert f"`./{console.DUMP_DIR}`" in PAGE


@pytest.mark.usefixtures("own_registry")
def test_a_table_is_shown_of_a_run_that_fails(
    faulty: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("XLLM_DEBUG", "2")
    assert opt(["example.xir", "--load", faulty, "-p", "dce,fault-lies", "--no-repro"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("01 dce ") and "Traceback" in err


def test_nothing_but_the_console_reads_the_dial() -> None:
    """Passes, the IR and everything else take what they are given."""
    files = [*(ROOT / "xllm_compiler").rglob("*.py"), *(ROOT / "passes").rglob("*.py")]
    readers = {p.resolve() for p in files if re.search(r"(environ|getenv).*DEBUG", p.read_text())}
    assert readers == {ROOT / "xllm_compiler" / "tools" / "console.py"}
