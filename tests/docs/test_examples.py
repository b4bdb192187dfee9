"""The programs in examples/ run as their docstrings say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
EXAMPLES = sorted(path.name for path in (ROOT / "examples").iterdir() if path.suffix == ".py")
PATH = f"{BIN}{os.pathsep}{os.environ['PATH']}"


def run(*command: str | Path, seconds: float = 300) -> str:
    """What a command printed, as somebody would type it in the root of the repository."""
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, env={**os.environ, "PATH": PATH}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def artifact(pytestconfig: pytest.Config) -> Path:
    """The bundled model, from the cache that the server's tests use when it is there."""
    kept = getattr(pytestconfig, "cache", None)
    where = [] if kept is None else ["--cache-dir", kept.mkdir("xllm-compile")]
    return Path(run("xllm-compile", "models/bundled", *where, seconds=900).splitlines()[-1])


def test_every_example_is_tested() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    assert sorted(set(re.findall(r'"examples/(\w+\.py)"', source))) == EXAMPLES


def test_offline(artifact: Path) -> None:
    printed = run("python", "examples/offline.py", artifact)
    assert printed.startswith("--- 'def add(a, b):'\n")
    answers = re.split(r"^--- .*\n", printed, flags=re.MULTILINE)[1:]
    assert len(answers) == 3 and all(map(str.strip, answers))


@pytest.fixture
def server(artifact: Path) -> Iterator[str]:
    """The address of a running `xllm-serve`."""
    command = [BIN / "xllm-serve", artifact, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            lines = iter(process.stdout.readline, "")
            yield next(found[1] for line in lines if (found := re.search(r"serving .* on (http://\S+)", line)))
        finally:
            process.kill()


def test_chat_client(server: str) -> None:
    printed = run("python", "examples/chat_client.py", server, "Write a function.")
    answer, _, usage = printed.rstrip().rpartition("\n")
    assert answer.strip() and re.fullmatch(r"\[\d+ tokens in, \d+ out\]", usage)


def test_custom_pass() -> None:
    printed = run("python", "examples/custom_pass.py")
    assert "%y = t.sub(%b, %a) : f32[N, 8]" in printed and "t.neg" not in printed


def test_custom_pass_in_the_tools() -> None:
    module = "xllm_compiler/testing/corpus/traced/apertus.xir"
    printed = run("xllm-opt", module, "--load", "examples/custom_pass.py", "-p", "turn-subtraction,@cpu", "--stats")
    assert "kv.attend" in printed


@pytest.mark.slow
def test_quantize(tmp_path: Path) -> None:
    printed = run("python", "examples/quantize.py", "models/bundled", tmp_path, seconds=900)
    sizes = [float(size) for size in re.findall(r"weights of ([\d.]+) MiB", printed)]
    assert len(sizes) == 3 and sizes == sorted(sizes, reverse=True)
    assert len(re.findall(r"KL divergence [\d.e-]+ nats", printed)) == 2
