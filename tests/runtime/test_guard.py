"""Files of an artifact that others change while it is served: answers stay right or end with an error, soon."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from toy_artifact import MULTIPLIER, WEIGHT_BYTES, build_toy_artifact, toy_answer

from xllm_compiler.artifact import read_manifest
from xllm_compiler.errors import XllmError
from xllm_compiler.runtime import guard as guard_module
from xllm_compiler.runtime import host
from xllm_compiler.runtime.llm import LLM, SamplingParams
from xllm_compiler.runtime.phases import Phases
from xllm_compiler.runtime.startup import EngineOptions, Started, prepare_engine

PROMPT = [3, 1, 4]
GREEDY = SamplingParams(temperature=0, max_tokens=20)
OPTIONS = EngineOptions(kv_cache_memory_bytes=4096, threads=1)


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    return build_toy_artifact(tmp_path / "toy")


@pytest.fixture
def served(toy: Path) -> Iterator[tuple[LLM, Started]]:
    started = prepare_engine(toy, OPTIONS, Phases())
    with LLM.from_engine(started.engine) as llm:
        yield llm, started


class Clients(threading.Thread):
    """Ask the same again and again until told to stop; what came, and errors."""

    def __init__(self, llm: LLM) -> None:
        super().__init__(daemon=True)
        self.llm, self.answers, self.error = llm, 0, None
        self.wrong: list[tuple[int, ...]] = []
        self._over = threading.Event()

    def run(self) -> None:
        want = tuple(toy_answer(PROMPT, 20))
        while not self._over.is_set():
            try:
                got = tuple(self.llm.generate([PROMPT], GREEDY)[0].outputs[0].token_ids)
            except XllmError as error:
                self.error = error
                return
            self.answers += 1
            if got != want:
                self.wrong.append(got)

    def wait(self, until: Callable[[], bool], seconds: float = 10.0) -> None:
        end = time.monotonic() + seconds
        while not until() and time.monotonic() < end:
            time.sleep(0.01)
        assert until()

    def stop(self) -> None:
        self._over.set()
        self.join(10)


def overwrite(path: Path) -> None:
    with open(path / "weights.bin", "r+b") as file:
        file.write(bytes([MULTIPLIER + 1]))


def truncate(path: Path) -> None:
    os.truncate(path / "weights.bin", 0)


def shorten(path: Path) -> None:
    os.truncate(path / "weights.bin", WEIGHT_BYTES // 2)


def append(path: Path) -> None:
    with open(path / "weights.bin", "ab") as file:
        file.write(b"more")


def copy_over(path: Path) -> None:
    """`cp -r other/. path`: every file is truncated and written."""
    other = path.parent / "other"
    shutil.copytree(path, other)
    overwrite_file = other / "weights.bin"
    overwrite_file.write_bytes(bytes([MULTIPLIER + 2]) + bytes(WEIGHT_BYTES - 1))
    shutil.copytree(other, path, dirs_exist_ok=True)


def code(path: Path) -> None:
    for library in (path / "cpu").iterdir():
        library.write_bytes(b"")


def rename_over(path: Path) -> None:
    new = path / "new"
    new.write_bytes(bytes(WEIGHT_BYTES))
    os.rename(new, path / "weights.bin")


def delete(path: Path) -> None:
    shutil.rmtree(path)


def touch(path: Path) -> None:
    os.utime(path / "weights.bin")


CHANGES = [overwrite, truncate, shorten, append, copy_over]
HARMLESS = [code, rename_over, delete, touch]


@pytest.mark.parametrize("change", [*CHANGES, *HARMLESS])
def test_answers_stay_right_whatever_becomes_of_the_files(
    change: Callable[[Path], None], toy: Path, served: tuple[LLM, Started]
) -> None:
    llm, started = served
    assert started.artifact.guard.protection == "lease"
    clients = Clients(llm)
    clients.start()
    clients.wait(lambda: clients.answers > 3)
    began = time.monotonic()
    change(toy)
    assert time.monotonic() - began < 5, "a writer does not wait for long"
    before = clients.answers
    clients.wait(lambda: clients.answers > before + 20 or clients.error is not None)
    clients.stop()
    assert clients.error is None and not clients.wrong and llm.engine.health().alive
    assert started.artifact.guard.protection == ("copy" if change in CHANGES else "lease")


@pytest.mark.parametrize("change", CHANGES)
def test_without_memory_for_a_copy_the_engine_ends_first(
    change: Callable[[Path], None], toy: Path, served: tuple[LLM, Started], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, _ = served
    monkeypatch.setattr(host, "available_memory", lambda: 1000)
    clients = Clients(llm)
    clients.start()
    clients.wait(lambda: clients.answers > 3)
    change(toy)
    clients.wait(lambda: clients.error is not None)
    assert not clients.wrong and "changed while it was served" in str(clients.error)
    assert clients.error is not None and clients.error.kind == "artifact"
    assert not llm.engine.health().alive


@pytest.fixture
def watched(toy: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[LLM, Started]]:
    monkeypatch.setattr(guard_module, "_take_lease", lambda fd: False)
    started = prepare_engine(toy, OPTIONS, Phases())
    with LLM.from_engine(started.engine) as llm:
        yield llm, started


@pytest.mark.parametrize("change", [overwrite, append])
def test_without_a_lease_wrong_answers_end_within_a_second(
    change: Callable[[Path], None], toy: Path, watched: tuple[LLM, Started]
) -> None:
    llm, started = watched
    assert started.artifact.guard.protection == "watch"
    clients = Clients(llm)
    clients.start()
    clients.wait(lambda: clients.answers > 3)
    began = time.monotonic()
    change(toy)
    clients.wait(lambda: clients.error is not None, 1.0)
    assert time.monotonic() - began < 1.0
    assert clients.error is not None and "changed while it was served" in clients.error.message
    assert "renaming" in clients.error.help and not llm.engine.health().alive


def test_a_cut_file_ends_an_idle_engine(toy: Path, watched: tuple[LLM, Started]) -> None:
    llm, _ = watched
    truncate(toy)
    end = time.monotonic() + 2
    while llm.engine.health().alive and time.monotonic() < end:
        time.sleep(0.01)
    with pytest.raises(XllmError, match="it has 0 bytes now, not 4096"):
        llm.generate([PROMPT], GREEDY)


@pytest.mark.parametrize("change", HARMLESS)
def test_without_a_lease_harmless_changes_are_harmless(
    change: Callable[[Path], None], toy: Path, watched: tuple[LLM, Started]
) -> None:
    llm, _ = watched
    change(toy)
    time.sleep(0.7)
    if change is touch:
        assert list(llm.generate([PROMPT], GREEDY)[0].outputs[0].token_ids) == toy_answer(PROMPT, 20)
    assert llm.engine.health().alive


def test_a_writer_that_is_there_already_leaves_no_lease(toy: Path) -> None:
    with open(toy / "weights.bin", "r+b"):
        started = prepare_engine(toy, OPTIONS, Phases())
        with LLM.from_engine(started.engine):
            assert started.artifact.guard.protection == "watch"


def test_nothing_is_kept_after_the_end(toy: Path) -> None:
    """No lease that makes writers wait, no thread."""
    started = prepare_engine(toy, OPTIONS, Phases())
    LLM.from_engine(started.engine).close()
    end = time.monotonic() + 2
    while any(thread.name == "xllm-guard" for thread in threading.enumerate()) and time.monotonic() < end:
        time.sleep(0.01)
    assert not any(thread.name == "xllm-guard" for thread in threading.enumerate())
    began = time.monotonic()
    overwrite(toy)
    assert time.monotonic() - began < 0.5


def test_loaded_code_is_a_copy(toy: Path) -> None:
    """Two artifacts whose libraries differ, loaded one after the other, are two libraries; both outlive their files."""
    isa = read_manifest(toy).target.levels[0]
    first = prepare_engine(toy, OPTIONS, Phases())
    (toy / "cpu" / f"{isa}.so").unlink()
    other = build_toy_artifact(toy.parent / "second")
    second = prepare_engine(other, OPTIONS, Phases())
    assert first.artifact.code.shared_library._name != second.artifact.code.shared_library._name
    for started in (first, second):
        with LLM.from_engine(started.engine) as llm:
            assert list(llm.generate([PROMPT], GREEDY)[0].outputs[0].token_ids) == toy_answer(PROMPT, 20)
