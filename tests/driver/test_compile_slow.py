"""Real compiles of a tiny model: the same bytes whatever the surroundings, and a cache that survives its makers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from xllm_compiler.artifact import WEIGHTS, check_files, read_manifest
from xllm_compiler.artifact.cpu_isa import CPU_FLAGS, machine_isas
from xllm_compiler.artifact.writer import ArtifactWriter

pytestmark = pytest.mark.slow

FLAGS = ["--isas", "avx2", "--max-num-seqs", "8", "--max-num-batched-tokens", "64", "--max-model-len", "128"]
MAIN = "import sys; from xllm_compiler.tools.compile import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from xllm_compiler.models.random_checkpoint import TINY, write_random_checkpoint

    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    return write_random_checkpoint("qwen3", path, settings={**TINY, "num_hidden_layers": 1, "head_dim": 32}, seed=5)


def start(*arguments: object, cwd: Path, seed: int = 0) -> subprocess.Popen[str]:
    # a store of compiled kernels of its own: two compiles that share one are the same for that reason alone
    environment = {**os.environ, "PYTHONHASHSEED": str(seed), "XLLM_CACHE_DIR": str(cwd / "store")}
    command = [sys.executable, "-c", MAIN, *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=1200)
    assert process.returncode == 0, err
    return out


def tree(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def spoil(artifact: Path, out: Path) -> None:
    """A sound artifact of a slightly wrong compile: one weight has another sign."""
    manifest = read_manifest(artifact)
    weight = next(w for w in manifest.weights.tensors if "down_proj" in w.name)
    with ArtifactWriter(out) as writer:
        for name in manifest.files:
            writer.copy(name, artifact / name)
        data = bytearray((artifact / WEIGHTS).read_bytes())
        data[weight.offset + 3] ^= 0x80
        (writer.path / WEIGHTS).write_bytes(data)
        writer.commit(replace(manifest, files={}))


def test_same_bytes_and_relocation(checkpoint: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "x" / "tiny"
    shutil.copytree(checkpoint, elsewhere)
    finish(start(checkpoint, "-o", tmp_path / "a", *FLAGS, cwd=tmp_path, seed=1))
    finish(start("tiny", "-o", "../b", *FLAGS, cwd=tmp_path / "x", seed=2))
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    for name, data in tree(tmp_path / "a").items():
        assert str(tmp_path).encode() not in data, f"{name} knows where it was made"
    assert finish(start("diff", tmp_path / "a", tmp_path / "b", cwd=tmp_path)).startswith("identical")
    moved = tmp_path / "deep" / "c"
    moved.parent.mkdir()
    (tmp_path / "a").rename(moved)
    if machine_isas():
        text = finish(start("verify", moved, "--checkpoint", checkpoint, cwd=tmp_path / "x"))
        assert text.count(" ok\n") == 4 and "transformers" in text
        spoil(moved, tmp_path / "spoilt")
        wrong = start("verify", tmp_path / "spoilt", "--checkpoint", checkpoint, cwd=tmp_path)
        text, _ = wrong.communicate(timeout=600)
        assert wrong.returncode == 1 and text.count("BEYOND TOLERANCE\n") == 2, text


def test_cache_with_a_killed_and_a_waiting_compile(checkpoint: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    arguments = (checkpoint, "--cache-dir", cache, *FLAGS)
    victim = start(*arguments, cwd=tmp_path)
    deadline = time.monotonic() + 600
    while not list(cache.glob(".*/artifact/module.xir")) and victim.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert victim.poll() is None, "the compile is at work, with a part of its artifact written"
    waiter = start(*arguments, cwd=tmp_path)
    time.sleep(2)
    victim.kill()
    victim.communicate()
    path = Path(finish(waiter).strip())
    manifest = read_manifest(path)
    check_files(path, manifest)
    assert sorted(os.listdir(cache)) == sorted([path.name, "kernels", "locks"])
    started = time.monotonic()
    again = start(*arguments, cwd=tmp_path)
    out, err = again.communicate()
    assert Path(out.strip()) == path and "from the cache" in err
    assert "trace" not in err, f"compiled again in {time.monotonic() - started:.1f} s"
    assert finish(start("explain", *arguments, cwd=tmp_path)).startswith("would use")


def test_the_levels_that_the_compiler_targets_are_those_that_loaders_know() -> None:
    from xllm_compiler.kernels.tir.isa.levels import ISAS

    assert [(isa.machine, isa.name) for isa in ISAS.values()] == [(m, n) for m in CPU_FLAGS for n in CPU_FLAGS[m]]
