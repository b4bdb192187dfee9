"""The compile cache: keys from what was read, one maker at a time, no trust in what was killed or damaged."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample_manifest import write_sample

from xllm_compiler.artifact import check_files, read_manifest
from xllm_compiler.cache import CompileCache, Difference, Factors, differences
from xllm_compiler.errors import XllmError

VALUES = {"option.dtype": "bfloat16", "option.unread": 1, "checkpoint.config.json": "ab", "version.torch": "2.13"}


def make(factors: Factors, calls: list[Path] | None = None) -> Any:
    def run(path: Path) -> None:
        for name in ("option.dtype", "checkpoint.config.json", "version.torch"):
            factors.read(name)
        if calls is not None:
            calls.append(path)
        write_sample(path, key=factors.key())

    return run


def test_made_once_then_found(tmp_path: Path) -> None:
    cache, calls = CompileCache(tmp_path / "cache"), []
    first, made = cache.obtain(Factors(VALUES), make(Factors(VALUES), calls))
    assert made and read_manifest(first).key == {n: v for n, v in VALUES.items() if n != "option.unread"}
    again, made = cache.obtain(Factors(VALUES), make(Factors(VALUES), calls))
    assert not made and again == first and len(calls) == 1


def test_what_was_not_read_does_not_matter(tmp_path: Path) -> None:
    cache, calls = CompileCache(tmp_path), []
    first, _ = cache.obtain(Factors(VALUES), make(Factors(VALUES), calls))
    other = {**VALUES, "option.unread": 2}
    second, made = cache.obtain(Factors(other), make(Factors(other), calls))
    assert second == first and not made


@given(
    st.dictionaries(st.sampled_from("abcde"), st.integers(0, 2), min_size=1),
    st.dictionaries(st.sampled_from("abcde"), st.integers(0, 2)),
    st.sets(st.sampled_from("abcde")),
)
def test_a_hit_means_that_all_reads_agree(first: dict[str, int], second: dict[str, int], reads: set[str]) -> None:
    made = Factors(first)
    for name in reads & set(first):
        made.read(name)
    agree = all(name in second and second[name] == first[name] for name in reads & set(first))
    assert (not differences(second, made.key())) == agree


def test_undeclared_factor_cannot_be_read() -> None:
    with pytest.raises(KeyError):
        Factors(VALUES).read("option.new")


def test_nearest_entry_and_first_difference(tmp_path: Path) -> None:
    cache = CompileCache(tmp_path)
    for change in ({"version.torch": "1.0", "option.dtype": "float32"}, {"version.torch": "2.0"}):
        values = {**VALUES, **change}
        cache.obtain(Factors(values), make(Factors(values)))
    assert cache.find(Factors(VALUES)) is None
    nearest, farther = cache.entries(Factors(VALUES))
    assert nearest.differences == (Difference("version.torch", "2.13", "2.0"),)
    assert [d.factor for d in farther.differences] == ["option.dtype", "version.torch"]


@pytest.mark.parametrize("name", ["weights.bin", "module.xir", "cpu/avx2.so", "manifest.json"])
def test_damaged_entry_is_made_again(tmp_path: Path, name: str) -> None:
    cache, notes = CompileCache(tmp_path), []
    path, _ = cache.obtain(Factors(VALUES), make(Factors(VALUES)))
    data = bytearray((path / name).read_bytes())
    data[len(data) // 2] ^= 1
    (path / name).write_bytes(data)
    again, made = cache.obtain(Factors(VALUES), make(Factors(VALUES)), notes.append)
    assert made and again == path and "made again" in notes[0]
    check_files(again, read_manifest(again))
    assert sorted(os.listdir(tmp_path)) == sorted([path.name, "locks"])


def test_failed_compile_leaves_no_entry_and_no_lock(tmp_path: Path) -> None:
    cache = CompileCache(tmp_path)

    def fail(path: Path) -> None:
        raise XllmError("unsupported", "no")

    with pytest.raises(XllmError, match="no"):
        cache.obtain(Factors(VALUES), fail)
    assert cache.obtain(Factors(VALUES), make(Factors(VALUES)))[1]


def test_cache_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(XllmError) as caught:
        CompileCache(tmp_path / "file" / "cache").obtain(Factors(VALUES), make(Factors(VALUES)))
    assert caught.value.kind == "io"


WORKER = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from sample_manifest import fill, sample
from xllm_compiler.artifact.writer import ArtifactWriter
from xllm_compiler.cache import CompileCache, Factors
values = {"option.dtype": sys.argv[3]}
def make(path):
    factors.read("option.dtype")
    with open(sys.argv[4], "a") as log:
        log.write(f"{os.getpid()}\\n")
    with ArtifactWriter(path) as writer:
        print("making", flush=True)
        for i in range(20):
            fill(writer)
            time.sleep(float(sys.argv[5]) / 20)
        writer.commit(sample(factors.key()))
factors = Factors(values)
path, made = CompileCache(Path(sys.argv[2])).obtain(factors, make)
print(path, made, flush=True)
"""


def start(root: Path, log: Path, dtype: str = "f32", seconds: float = 0.3) -> subprocess.Popen[str]:
    artifact_tests = str(Path(__file__).parents[1] / "artifact")
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, artifact_tests, str(root), dtype, str(log), str(seconds)],
        stdout=subprocess.PIPE,
        text=True,
    )


def test_concurrent_processes_make_each_key_once(tmp_path: Path) -> None:
    root, log = tmp_path / "cache", tmp_path / "log"
    processes = [start(root, log, dtype) for dtype in ("f32", "bf16") for _ in range(4)]
    outputs = [process.communicate(timeout=60)[0].splitlines()[-1] for process in processes]
    assert all(process.returncode == 0 for process in processes)
    assert len(log.read_text().splitlines()) == 2
    assert sum(line.endswith("True") for line in outputs) == 2
    assert len({line.split()[0] for line in outputs}) == 2
    for line in outputs:
        path = Path(line.split()[0])
        check_files(path, read_manifest(path))


def test_kill_at_any_moment(tmp_path: Path) -> None:
    """Kill makers at random moments while another waits for the lock; whatever is visible is always whole."""
    root, log = tmp_path / "cache", tmp_path / "log"
    draw = random.Random(0)
    for _ in range(6):
        victim = start(root, log)
        assert victim.stdout is not None
        victim.stdout.readline()
        waiter = start(root, log, seconds=0.02)
        time.sleep(draw.uniform(0, 0.4))
        victim.kill()
        victim.communicate()
        output = waiter.communicate(timeout=30)[0]
        assert waiter.returncode == 0
        path = Path(output.splitlines()[-1].split()[0])
        check_files(path, read_manifest(path))
        assert sorted(os.listdir(root)) == sorted([path.name, "locks"])
        for file in sorted(path.rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
        path.rmdir()
