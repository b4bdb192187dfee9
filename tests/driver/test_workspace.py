"""Where a compile's temporary files go, and what it needs of a user: no name, no home, no /tmp."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from other_user import close_to_others, open_to_all, run_as_other
from sample_manifest import fill, sample, write_sample

from xllm_compiler.artifact import check_files, read_manifest
from xllm_compiler.artifact.writer import ArtifactWriter
from xllm_compiler.cache import CompileCache, Factors
from xllm_compiler.errors import XllmError
from xllm_compiler.models.random_checkpoint import TINY, write_random_checkpoint
from xllm_compiler.workspace import has_home, temporary_files

HOMES = ["", "/", "/nonexistent", "relative"]


@pytest.mark.parametrize("home", HOMES)
def test_every_temporary_file_is_below_the_work_directory(
    home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", "/nonexistent")
    monkeypatch.setenv("HOME", home)
    before = dict(os.environ)
    with ArtifactWriter(tmp_path / "out") as writer, temporary_files(writer.work):
        with tempfile.NamedTemporaryFile() as ours:
            assert Path(ours.name).is_relative_to(writer.work)
        child = subprocess.run(
            [sys.executable, "-c", "import tempfile; print(tempfile.mkdtemp())"], capture_output=True, text=True
        )
        assert Path(child.stdout.strip()).is_relative_to(writer.work)
        if not has_home():
            assert Path(os.environ["HOME"]).is_relative_to(writer.work)
        fill(writer)
        writer.commit(sample())
    assert dict(os.environ) == before
    assert os.listdir(tmp_path) == ["out"]
    check_files(tmp_path / "out", read_manifest(tmp_path / "out"))


KILLED = """
import os, signal, sys, tempfile
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from sample_manifest import fill, sample
from xllm_compiler.artifact.writer import ArtifactWriter
from xllm_compiler.workspace import temporary_files
with ArtifactWriter(Path(sys.argv[2])) as writer, temporary_files(writer.work):
    folder = Path(tempfile.mkdtemp())
    (folder / "0.o").write_bytes(b"code")
    fill(writer)
    if sys.argv[3] == "published":
        writer.commit(sample())
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("when", ["writing", "published", "published over another"])
def test_a_kill_leaves_nothing_that_the_next_writer_does_not_remove(when: str, tmp_path: Path) -> None:
    tmp, out = tmp_path / "tmp", tmp_path / "outputs" / "out"
    tmp.mkdir()
    if when == "published over another":
        write_sample(out, text="older\n")
    artifact_tests = str(Path(__file__).parents[1] / "artifact")
    command = [sys.executable, "-c", KILLED, artifact_tests, str(out), when.split()[0]]
    done = subprocess.run(command, env={**os.environ, "TMPDIR": str(tmp)}, check=False)
    assert done.returncode == -9
    assert os.listdir(tmp) == [] and len(os.listdir(out.parent)) == 1 + out.exists()
    write_sample(out)
    assert os.listdir(out.parent) == ["out"]
    check_files(out, read_manifest(out))


@pytest.fixture
def shared() -> Iterator[Path]:
    """A directory that others may reach; pytest's own are closed to them."""
    with tempfile.TemporaryDirectory() as name:
        open_to_all(Path(name))
        yield Path(name)


@pytest.fixture(scope="module")
def checkpoint() -> Iterator[Path]:
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "tiny"
    write_random_checkpoint("llama", path, settings=TINY, dtype="float32")
    open_to_all(path.parent)
    yield path
    folder.cleanup()


PROGRAM = "import sys; from xllm_compiler.tools.compile import main; sys.exit(main(sys.argv[1:]))"


def compile_as_other(checkpoint: Path, folder: Path, *more: str, **env: str) -> subprocess.CompletedProcess[str]:
    return run_as_other([sys.executable, "-c", PROGRAM, str(checkpoint), "--isas", "avx2", *more], folder, **env)


def test_a_user_without_name_home_and_tmp_compiles(checkpoint: Path, shared: Path) -> None:
    done = compile_as_other(checkpoint, shared, "-o", "out", TMPDIR="/nonexistent")
    assert done.returncode == 0, done.stderr
    assert os.listdir(shared) == ["out"], "nothing but the artifact, no directory called ~ either"
    check_files(shared / "out", read_manifest(shared / "out"))


@pytest.mark.parametrize("flags", [(), ("--tune", "-o", "out")])
def test_a_user_without_home_is_told_where_the_cache_may_be(
    flags: tuple[str, ...], checkpoint: Path, shared: Path
) -> None:
    env = {} if os.getuid() == 0 else {"HOME": "/nonexistent"}
    done = compile_as_other(checkpoint, shared, *flags, **env)
    assert done.returncode == 2 and "error[internal]" not in done.stderr
    assert "--cache-dir" in done.stderr and "-o" in done.stderr


VALUES = {"option.dtype": "f32"}

READ_ONLY = """
import sys
from pathlib import Path
from xllm_compiler.cache import CompileCache, Factors
from xllm_compiler.errors import XllmError
def make(path):
    raise SystemExit("made")
try:
    print(CompileCache(Path(sys.argv[1])).obtain(Factors({"option.dtype": sys.argv[2]}), make))
except XllmError as error:
    print(error)
"""


def obtain_read_only(root: Path, dtype: str) -> str:
    open_to_all(root)
    close_to_others(root)
    done = run_as_other([sys.executable, "-c", READ_ONLY, str(root), dtype], root)
    return done.stdout + done.stderr


@pytest.mark.parametrize("locks", [True, False])
def test_a_read_only_cache_serves_what_it_has(locks: bool, shared: Path) -> None:
    root = shared / "cache"
    factors = Factors(VALUES)
    factors.read("option.dtype")
    path, _ = CompileCache(root).obtain(factors, lambda at: write_sample(at, key=factors.key()))
    if not locks:  # somebody copied the entries only
        for file in (root / "locks").iterdir():
            file.unlink()
        (root / "locks").rmdir()
    assert str(path) in obtain_read_only(root, "f32") and "False" in obtain_read_only(root, "f32")
    for told in (obtain_read_only(root, "bf16"),):
        assert told.startswith("error[io]: the cache cannot be written") and "--cache-dir" in told and "-o" in told
    open_to_all(root)


def test_a_damaged_entry_of_a_read_only_cache_is_not_used(shared: Path) -> None:
    root = shared / "cache"
    factors = Factors(VALUES)
    factors.read("option.dtype")
    path, _ = CompileCache(root).obtain(factors, lambda at: write_sample(at, key=factors.key()))
    (path / "weights.bin").write_bytes(b"x" * 256)
    assert obtain_read_only(root, "f32").startswith("error[io]: the cache cannot be written")
    open_to_all(root)


def test_a_cache_that_is_no_directory(shared: Path) -> None:
    for place in ("file", "file/below"):
        (shared / "file").write_text("x")
        with pytest.raises(XllmError) as caught:
            CompileCache(shared / place).obtain(Factors(VALUES), lambda at: None)
        assert caught.value.kind == "io" and "--cache-dir" in caught.value.help
