"""Writing and checking artifact directories: all or nothing, and every damaged byte is found."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import xxhash
from sample_manifest import fill, sample, write_sample

from xllm_compiler.artifact import check_files, digest_file, read_manifest
from xllm_compiler.artifact import digest as digest_module
from xllm_compiler.artifact import writer as writer_module
from xllm_compiler.artifact.digest import digest_mapped
from xllm_compiler.artifact.writer import ArtifactWriter, remove_leftovers
from xllm_compiler.errors import XllmError


def tree(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_write_then_read(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "er" / "out"
    manifest = write_sample(out)
    assert read_manifest(out) == manifest
    check_files(out, manifest)
    code = ["cpu/avx2.so", "cpu/avx512.so"]
    assert sorted(tree(out)) == ["calls.json", *code, "manifest.json", "module.xir", "weights.bin"]
    assert os.listdir(out.parent) == ["out"]


def test_same_bytes_twice_and_after_a_move(tmp_path: Path) -> None:
    write_sample(tmp_path / "a")
    write_sample(tmp_path / "b")
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    moved = tmp_path / "elsewhere" / "c"
    moved.parent.mkdir()
    shutil.move(tmp_path / "a", moved)
    check_files(moved, read_manifest(moved))


def test_one_flipped_bit_in_any_file(tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = write_sample(out)
    for name, data in tree(out).items():
        for at in (0, len(data) // 2, len(data) - 1):
            flipped = bytearray(data)
            flipped[at] ^= 0x10
            (out / name).write_bytes(flipped)
            with pytest.raises(XllmError) as caught:
                check_files(out, read_manifest(out))
            assert caught.value.kind == "artifact"
            assert name in str(caught.value)
        (out / name).write_bytes(data)
    check_files(out, manifest)


def test_truncated_missing_and_replaced_by_directory(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name in write_sample(out).files:
        data = (out / name).read_bytes()
        (out / name).write_bytes(data[:-1])
        with pytest.raises(XllmError, match="truncated"):
            check_files(out, read_manifest(out))
        (out / name).write_bytes(data + b"x")
        with pytest.raises(XllmError, match="too long"):
            check_files(out, read_manifest(out))
        (out / name).unlink()
        with pytest.raises(XllmError, match=f"{name} is missing"):
            check_files(out, read_manifest(out))
        (out / name).mkdir()
        with pytest.raises(XllmError, match="not a file"):
            check_files(out, read_manifest(out))
        (out / name).rmdir()
        (out / name).write_bytes(data)
    with pytest.raises(XllmError, match="lists no file"):
        check_files(out, read_manifest(out), ["tokenizer.json"])


def test_sizes_are_checked_before_any_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    manifest = write_sample(out)
    (out / "weights.bin").write_bytes(b"short")
    monkeypatch.setattr(
        "xllm_compiler.artifact.io.digest_open", lambda *_: pytest.fail("hashed before all sizes were seen")
    )
    with pytest.raises(XllmError, match="truncated"):
        check_files(out, manifest)


def test_not_an_artifact(tmp_path: Path) -> None:
    with pytest.raises(XllmError, match="no such directory") as caught:
        read_manifest(tmp_path / "absent")
    assert caught.value.kind == "artifact" and caught.value.exit_code == 2
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(XllmError) as caught:
        read_manifest(tmp_path)
    assert "xllm-compile" in caught.value.help
    with pytest.raises(XllmError):
        read_manifest(tmp_path / "config.json")


def test_digest_of_large_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = os.urandom(10_007)
    path = tmp_path / "f"
    path.write_bytes(data)
    assert digest_file(path) == xxhash.xxh3_128(data).hexdigest()
    monkeypatch.setattr(digest_module, "CHUNK", 1000)
    parts = b"".join(xxhash.xxh3_128(data[i : i + 1000]).digest() for i in range(0, len(data), 1000))
    for threads in (1, 4):
        assert digest_file(path, threads) == xxhash.xxh3_128(parts).hexdigest()


def test_failure_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ZeroDivisionError), ArtifactWriter(out) as writer:
        fill(writer)
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []
    with ArtifactWriter(out) as writer:
        fill(writer)
    assert os.listdir(tmp_path) == []


def test_failure_keeps_the_old_artifact(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_sample(out)
    before = tree(tmp_path)
    with pytest.raises(ZeroDivisionError), ArtifactWriter(out) as writer:
        fill(writer, text="new")
        raise ZeroDivisionError
    assert tree(tmp_path) == before


@pytest.mark.parametrize("exchange", [True, False])
def test_replacing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    if not exchange:
        monkeypatch.setattr(writer_module, "_RENAME_EXCHANGE", 0x80)  # an invalid flag: what an old file system answers
    out = tmp_path / "out"
    first = write_sample(out)
    with open(out / "module.xir") as reader:  # a server keeps its mapped files
        second = write_sample(out, text="another\n")
        assert reader.read() == "xir 1\n"
    assert first.id != second.id
    assert read_manifest(out) == second
    assert os.listdir(tmp_path) == ["out"]


def test_empty_directory_is_used(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write_sample(tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]


def test_foreign_directories_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("x")
    with pytest.raises(XllmError, match=r"thesis\.tex") as caught:
        write_sample(out)
    assert caught.value.kind == "io"
    (out / "thesis.tex").unlink()
    write_sample(out)
    (out / "cpu" / "notes.txt").write_text("x")
    with pytest.raises(XllmError, match=r"cpu/notes\.txt"):
        write_sample(out)
    (out / "cpu" / "notes.txt").unlink()
    (out / "manifest.json").write_text("{}")
    with pytest.raises(XllmError, match="cannot be read"):
        write_sample(out)
    with pytest.raises(XllmError, match="not a directory"):
        write_sample(out / "manifest.json")


def test_output_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(XllmError) as caught:
        write_sample(tmp_path / "file" / "out")
    assert caught.value.kind == "io"


def test_full_disk(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(XllmError) as caught, ArtifactWriter(out):
        raise OSError(errno.ENOSPC, "No space left on device")  # numpy's tofile gives no file name
    assert caught.value.kind == "io" and "no space" in caught.value.message
    assert os.listdir(tmp_path) == []
    with pytest.raises(XllmError) as caught, ArtifactWriter(out) as writer:
        fill(writer)
        os.symlink("/dev/full", writer.path / "big")
        (writer.path / "big").write_text("x" * 100)
    assert caught.value.kind == "io"
    assert os.listdir(tmp_path) == []


def test_other_os_errors_are_not_blamed_on_the_output(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), ArtifactWriter(tmp_path / "out") as writer:
        writer.copy("x", tmp_path / "absent")


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from sample_manifest import fill
from xllm_compiler.artifact.writer import ArtifactWriter
with ArtifactWriter(Path(sys.argv[2])) as writer:
    fill(writer)
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_killed_writer_is_cleared_and_a_living_one_is_not(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        assert remove_leftovers(tmp_path) == []
        write_sample(out)
        assert len(os.listdir(tmp_path)) == 2
        process.kill()
        process.wait()
        deadline = time.monotonic() + 10
        while len(os.listdir(tmp_path)) == 2 and time.monotonic() < deadline:
            write_sample(out, text="again\n")
    assert os.listdir(tmp_path) == ["out"]


def test_validation_failure_publishes_nothing(tmp_path: Path) -> None:
    with pytest.raises(XllmError, match=r"cpu/avx512\.so is not listed"), ArtifactWriter(tmp_path / "out") as writer:
        fill(writer, isas=("avx2",))
        writer.commit(sample())
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("size", [1, 4096, 3 * (1 << 20) + 5])
def test_digest_of_a_mapped_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """That of the file, in chunks or not, also where Linux has no way to bring pages in beforehand."""
    path = tmp_path / "f"
    path.write_bytes(np.random.default_rng(size).bytes(size))
    for chunk, populate in ((digest_module.CHUNK, 22), (1 << 20, 22), (1 << 20, 9999)):
        monkeypatch.setattr(digest_module, "CHUNK", chunk)
        monkeypatch.setattr(digest_module, "_MADV_POPULATE_READ", populate)
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
            assert digest_mapped(memory, 2) == digest_file(path)


def test_a_page_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    """Here one past the end of a file that became shorter; touching it would end the process."""
    path = tmp_path / "f"
    path.write_bytes(bytes(1 << 20))
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
        os.truncate(path, 4096)
        with pytest.raises(OSError):
            digest_mapped(memory)
