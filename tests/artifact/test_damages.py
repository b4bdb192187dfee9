"""Random damage to every file of an artifact: a typed error, or the very bytes that were published."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from toy_artifact import build_toy_artifact

from xllm_compiler.artifact import Contents, check_files, read_manifest
from xllm_compiler.errors import XllmError
from xllm_compiler.runtime.loader import load_artifact

KINDS = ("artifact", "io")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_toy_artifact(tmp_path_factory.mktemp("toy") / "artifact")


def files_of(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if not p.is_dir())


def damage(draw: random.Random, path: Path) -> str:
    """Do something bad to one file; what it was."""
    target = draw.choice(files_of(path))
    data = bytearray(target.read_bytes())
    how = draw.choice(["flip", "cut", "grow", "swap", "delete", "empty", "zero", "copy", "directory", "fifo", "json"])
    match how:
        case "flip":
            for _ in range(draw.choice([1, 1, 30])):
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        case "cut":
            del data[draw.randrange(len(data)) :]
        case "grow":
            data += draw.randbytes(draw.choice([1, 4096]))
        case "zero":
            at = draw.randrange(len(data))
            data[at : at + 4096] = bytes(len(data[at : at + 4096]))
        case "copy":
            data[:] = draw.choice(files_of(path)).read_bytes()
        case "empty":
            data.clear()
        case "json":
            target = path / "manifest.json"
            data = bytearray(
                json.dumps(edited(draw, json.loads(target.read_text())), indent=1, sort_keys=True).encode()
            )
    if how == "swap":
        other = draw.choice(files_of(path))
        a, b = target.read_bytes(), other.read_bytes()
        target.write_bytes(b)
        other.write_bytes(a)
    elif how in ("delete", "directory", "fifo"):
        target.unlink()
        if how == "directory":
            target.mkdir()
        elif how == "fifo":
            os.mkfifo(target)
    else:
        target.write_bytes(data)
    return f"{how} {target.name}"


OTHERS: list[Any] = [
    *(0, -1, 1, 2**31, 2**63, 10**30, 1.5, None, True, [], {}, [[[]]]),
    *("", "x", "N", "\ud800", "../x", "9" * 5000),
]


def edited(draw: random.Random, value: Any) -> Any:
    """The value with one part, anywhere, changed, removed or doubled."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        name = draw.choice(sorted(value))
        if draw.random() < 0.1:
            return {key: item for key, item in value.items() if key != name}
        return {**value, name: edited(draw, value[name])}
    if isinstance(value, list) and value and draw.random() < 0.9:
        at = draw.randrange(len(value))
        return [*value[:at], edited(draw, value[at]), *value[at:]][: len(value) + draw.randrange(2)]
    return draw.choice(
        [0, -1, 1, 2**31, 2**63, 10**30, 1.5, "", "x", "N", "\ud800", "../x", None, True, [], {}, [[[]]], "9" * 5000]
    )


def bytes_of(path: Path) -> dict[str, bytes]:
    """What a runtime would read: every file that is listed."""
    manifest = read_manifest(path)
    files = Contents(path, manifest)
    check_files(path, manifest)
    return {name: (files / name).read_bytes() for name in manifest.files}


def trials(sound: Path, folder: Path, seed: int, count: int) -> Iterator[tuple[str, Path]]:
    """Damaged copies, of which only the damaged part is made again."""
    draw = random.Random(seed)
    for i in range(count):
        path = folder / str(i)
        shutil.copytree(sound, path)
        yield damage(draw, path), path
        shutil.rmtree(path)


def test_four_hundred_damages(sound: Path, tmp_path: Path) -> None:
    published = bytes_of(sound)
    refused = 0
    for what, path in trials(sound, tmp_path, 0, 400):
        began = time.monotonic()
        try:
            loaded = load_artifact(path)
            loaded.wait_checked()
            assert {name: (loaded.files / name).read_bytes() for name in published} == published, what
            assert bytes(loaded.weights) == published["weights.bin"], what
            loaded.guard.close()
        except XllmError as error:
            assert error.kind in KINDS, (what, error)
            str(error).encode()
            refused += 1
        assert time.monotonic() - began < 10, what
    assert 300 < refused < 400, "some damages, such as a swap of a file with itself, do nothing"


@pytest.mark.slow
def test_damages_through_the_tools(sound: Path, tmp_path: Path) -> None:
    program = "import sys; from xllm_compiler.tools.compile import main; sys.exit(main(sys.argv[1:]))"
    server = "from xllm_compiler.runtime.server.main import entry; entry()"
    for what, path in trials(sound, tmp_path, 1, 40):
        try:
            check_files(path, read_manifest(path))
            continue  # it is whole
        except XllmError:
            pass
        for command in ([program, "diff", str(path), str(sound)], [server, str(path), "--port", "0"]):
            done = subprocess.run([sys.executable, "-c", *command], capture_output=True, text=True, timeout=60)
            told = done.stdout + done.stderr
            assert done.returncode == 2 and "error[" in told and "Traceback" not in told, (what, told)
            assert "error[internal]" not in told, (what, told)
