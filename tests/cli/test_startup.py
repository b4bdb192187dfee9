"""How the tools start: without torch and TVM, quickly, and with the right exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

SLOW = ("torch", "transformers", "tvm", "sympy", "hypothesis", "pytest")
TOOLS = ("opt", "run", "trace", "reduce", "bisect", "new_pass")
MODULE = (
    "xir 1 stage=graph\ndim N in [1, 8]\nfunc @f(%x: f32[N]) -> (f32[N]) {\n  %y = t.neg(%x) : f32[N]\n  return %y\n}\n"
)


def python(code: str, folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, env={**os.environ, **env}, timeout=60
    )


def run_and_list_modules(tool: str, argv: list[str], folder: Path) -> tuple[int, list[str], str]:
    """Exit code, the slow modules that were imported, standard error."""
    code = (
        f"import json, sys; from xllm_compiler.tools.{tool} import main; code = main({argv!r});"
        "print('\\n@@' + json.dumps([code, sorted(sys.modules)]))"
    )
    done = python(code, folder)
    assert done.returncode == 0, done.stderr
    code_, modules = json.loads(done.stdout.rpartition("@@")[2])
    return code_, [m for m in SLOW if m in modules], done.stderr


@pytest.mark.parametrize("tool", TOOLS)
def test_help_imports_not_even_numpy(tool: str, tmp_path: Path) -> None:
    code = (
        f"import sys; from xllm_compiler.tools.{tool} import main; code = main(['--help']);"
        f"print('numpy' in sys.modules, [m for m in {SLOW} if m in sys.modules], code, file=sys.stderr)"
    )
    done = python(code, tmp_path)
    assert done.stderr == "False [] 0\n"
    assert f"usage: xllm-{tool.replace('_', '-')}" in done.stdout


@pytest.mark.parametrize(
    ("tool", "argv", "code"),
    [
        ("opt", ["m.xir", "-p", "@cpu", "--check-equiv", "--interp", "N=3", "--verify-diagnostics"], 0),
        ("opt", ["m.xir", "--report", "r.html", "--timeline", "t.json"], 0),
        ("opt", ["--list-passes"], 0),
        ("opt", ["no.xir"], 2),
        ("run", ["m.xir", "N=3", "-o", "out.npz"], 0),
        ("run", ["m.xir", "N=9"], 2),
        ("trace", ["no-such-directory"], 2),
        ("trace", [".", "--dtype", "float32"], 2),
        ("reduce", ["m.xir", "-p", "dce"], 2),
        ("bisect", ["m.xir", "-p", "dce"], 0),
        ("new_pass", ["drop-things"], 0),
        ("new_pass", ["Drop"], 2),
    ],
)
def test_they_work_without_torch(tool: str, argv: list[str], code: int, tmp_path: Path) -> None:
    (tmp_path / "m.xir").write_text(MODULE)
    got, slow, err = run_and_list_modules(tool, argv, tmp_path)
    assert (got, slow) == (code, []), err
    assert (code == 0) or err.startswith("error[")


@pytest.mark.parametrize("tool", TOOLS)
def test_help_is_quick(tool: str, tmp_path: Path) -> None:
    """The best of a few, since other tests share the machine; 0.4 s is what the tools promise."""
    code = f"import sys; from xllm_compiler.tools.{tool} import main; sys.exit(main(['--help']))"
    best = 1e9
    for _ in range(5):
        begin = time.perf_counter()
        assert python(code, tmp_path).returncode == 0
        best = min(best, time.perf_counter() - begin)
        if best < 0.4:
            break
    assert best < 0.4


def test_a_reader_that_goes_away_is_no_crash(tmp_path: Path) -> None:
    text = "\n".join(f"func @f{i}(%x: f32[8]) -> (f32[8]) {{\n  return %x\n}}" for i in range(2000))
    (tmp_path / "m.xir").write_text("xir 1 stage=graph\n" + text)
    code = "import sys; from xllm_compiler.tools.opt import main; sys.exit(main(['m.xir']))"
    command = f"{sys.executable} -c {json.dumps(code)} | head -1"
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout == "xir 1 stage=graph\n" and "Traceback" not in done.stderr
