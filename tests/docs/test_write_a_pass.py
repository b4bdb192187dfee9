"""docs/write-a-pass.md from top to bottom, in an empty directory, as a reader would: every file written, every command
run by a shell. What the page says is expected of it: exit codes, and what its reports must say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "write-a-pass.md").read_text()
SETUP = "make setup"  # done already, or this test would not run


def steps() -> Iterator[tuple[str, str]]:
    """("file name" or "", text) of every indented block; a block after "`name`:" is a file, any other one commands."""
    for before, block in re.findall(r"([^\n]*)\n\n((?:    [^\n]*\n|\n(?=\n*    ))+)", PAGE):
        name = re.search(r"`([\w/.-]+\.\w+)`:$", before)
        yield (name[1] if name else ""), re.sub(r"^    ", "", block, flags=re.MULTILINE)


def run(command: str, folder: Path) -> str:
    """Runs one line of the page; what it printed."""
    line, _, said = command.partition("  # exit code ")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", line], cwd=folder, capture_output=True, text=True, env={**os.environ, "PATH": path}, timeout=600
    )
    assert done.returncode == int(said or 0), f"{line}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.mark.slow  # it judges a pass by all laws three times
def test_the_page_runs(tmp_path: Path) -> None:
    printed: dict[str, str] = {}
    for name, text in steps():
        if name:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        elif not text.startswith((SETUP, "[")):
            for command in text.strip().splitlines():
                printed[command] = printed.get(command, "") + run(command, tmp_path)

    [laws] = [out for command, out in printed.items() if command.startswith("pytest  ") and "exit code 1" in command]
    assert "breaks law `meaning`" in laws and "fold-scale/scale" in laws and "xllm-bisect" in laws
    assert "FAILED laws::fold-scale::meaning" in laws
    [bisected] = [out for command, out in printed.items() if command.startswith("xllm-bisect")]
    assert "fold-scale/scale" in bisected and "%bad" in bisected and "%good = nn.linear(%x, %w)" not in bisected
    assert "act=silu" in (tmp_path / "least.xir").read_text()
    [explained] = [out for command, out in printed.items() if "--explain" in command]
    assert "fold-scale/scale at %b = t.mul: fired" in explained
    [planned] = [out for command, out in printed.items() if "--stats" in command]
    assert re.search(r"^fold-scale: .*\bscale [1-9]", planned, re.MULTILINE), planned
    assert (tmp_path / "report.html").stat().st_size > 10_000
