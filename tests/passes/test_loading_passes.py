"""Passes from outside: by file, by module, by entry point."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from xllm_compiler.errors import XllmError
from xllm_compiler.passes.manager import parse_pipeline
from xllm_compiler.passes.registry import load_passes, pass_class

SOURCE = """
from dataclasses import dataclass

from xllm_compiler.passes.base import FuncPass
from xllm_compiler.passes.registry import register_pass


@register_pass("{name}")
@dataclass(frozen=True)
class Outside(FuncPass):
    \"\"\"before and after are the same.\"\"\"

    def run_on(self, func, ctx):
        return False
"""


def test_a_file_is_loaded_once(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(SOURCE.format(name="test-outside-file"))
    assert load_passes(str(path)) == load_passes(str(path)) == ["test-outside-file"]
    assert str(parse_pipeline("dce,test-outside-file")) == "dce,test-outside-file"


def test_the_key_of_an_outside_pass_follows_its_source_and_not_its_place(tmp_path: Path) -> None:
    keys = []
    for folder, text in (("a", ""), ("b", ""), ("c", "# changed\n")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(SOURCE.format(name="test-outside-key") + text)
        code = (
            "from xllm_compiler.passes.registry import load_passes; load_passes('mine.py')\n"
            "from xllm_compiler.passes.manager import parse_pipeline\n"
            "print(parse_pipeline('test-outside-key').hash())"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        keys.append(done.stdout)
    assert keys[0] == keys[1] != keys[2]


def test_a_module_is_found_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "outside_package").mkdir()
    (tmp_path / "outside_package" / "__init__.py").write_text("from . import inner\n")
    (tmp_path / "outside_package" / "inner.py").write_text(SOURCE.format(name="test-outside-module"))
    monkeypatch.syspath_prepend(tmp_path)
    assert load_passes("outside_package") == ["test-outside-module"]


def test_an_installed_package_offers_passes(tmp_path: Path) -> None:
    (tmp_path / "offered.py").write_text(SOURCE.format(name="test-offered"))
    info = tmp_path / "offered-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: offered\nVersion: 1.0\n")
    entries = "test-offered = offered:Outside\ntest-missing = offered:Missing\ntest-other = offered:Outside\n"
    (info / "entry_points.txt").write_text(f"[xllm_compiler.passes]\n{entries}")
    code = """
from xllm_compiler.errors import XllmError
from xllm_compiler.passes.registry import pass_class, pass_names
print("test-offered" in pass_names(), pass_class("test-offered").__module__)
for name in ("test-missing", "test-other"):
    try:
        pass_class(name)
    except XllmError as e:
        print(e.message)
"""
    env = {"PYTHONPATH": f"{tmp_path}:{Path(__file__).resolve().parents[2]}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    failed = "package offered 1.0 offers pass test-missing, which cannot be loaded: AttributeError"
    assert done.stdout.splitlines() == [
        "True offered",
        f"{failed}: module 'offered' has no attribute 'Missing'",
        "offered:Outside does not register a pass 'test-other'",
    ], done.stderr


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("x = 1\n", "registers no pass"),
        ("x = = 1\n", "SyntaxError"),
        ("import no_such_module_here\n", "ModuleNotFoundError"),
        ("from xllm_compiler.passes.registry import register_pass\nregister_pass('Bad Name')\n", "not a pass name"),
    ],
)
def test_a_file_that_gives_no_pass_is_refused(tmp_path: Path, source: str, says: str) -> None:
    path = tmp_path / "bad.py"
    path.write_text(source)
    with pytest.raises(XllmError, match=says):
        load_passes(str(path))


def test_what_is_not_there_is_refused() -> None:
    with pytest.raises(XllmError, match="No such file"):
        load_passes("nowhere/mine.py")
    with pytest.raises(XllmError, match="no_such_module_here"):
        load_passes("no_such_module_here")
    with pytest.raises(XllmError, match="did you mean 'dce'"):
        pass_class("dcee")
