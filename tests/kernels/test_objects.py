"""Kernels compiled in other processes: the same objects, kept, and what goes wrong there told here."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from xllm_compiler.errors import XllmError
from xllm_compiler.kernels.tir.codegen.kernel import MEMBER_ARGS, Arg, Kernel
from xllm_compiler.kernels.tir.isa.levels import ISAS, Isa
from xllm_compiler.kernels.tir.linear.linear import Linear
from xllm_compiler.kernels.tir.native import objects
from xllm_compiler.kernels.tir.native.objects import KernelObjects, compile_kernel
from xllm_compiler.kernels.tir.rows.norms import RmsNorm

NORMS = [RmsNorm(n, "bf16", 1e-6) for n in (32, 40, 48)]


@dataclass(frozen=True)
class Troubled(Kernel):
    """Writes its process's number to `path` and ends as `how` says."""

    path: str
    how: str

    @property
    def args(self) -> tuple[Arg, ...]:
        return MEMBER_ARGS

    @property
    def symbol(self) -> str:
        return "troubled"

    def build(self, isa: Isa) -> Any:
        Path(self.path).write_text(str(os.getpid()))
        if self.how == "refuses":
            raise XllmError("unsupported", "no code for it", where="Troubled", help="none")
        if self.how == "fails":
            raise ZeroDivisionError("by zero")
        if self.how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)


def test_a_level_shares_what_is_not_its_own() -> None:
    """The 8-bit dot product changes no norm; a layer that multiplies bytes is made for both levels."""
    store, levels = KernelObjects(), (ISAS["avx512"], ISAS["avx512_vnni"])
    layer = Linear(64, 64, "bf16", "bf16", weights="q8")
    with store.compiling([(kernel, isa) for kernel in (NORMS[0], layer) for isa in levels], 2):
        pass
    plain, other = (store.get(NORMS[0], isa) for isa in levels)
    assert plain is other
    assert store.get(layer, levels[0]) != store.get(layer, levels[1])


def test_others_compile_the_same_objects_and_each_once(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [(norm, ISAS[isa]) for norm in NORMS for isa in ("avx2", "avx512")]
    store, ran = KernelObjects(), []
    with store.compiling(jobs + jobs, 2):
        ran.append("meanwhile")
    assert ran == ["meanwhile"]
    expected = {job: compile_kernel(*job) for job in jobs}

    def none(kernel: Kernel, isa: Isa) -> bytes:
        raise AssertionError(f"{kernel.symbol} again")

    monkeypatch.setattr(objects, "compile_kernel", none)
    assert {job: store.get(*job) for job in jobs} == expected
    with store.compiling(jobs, 2):
        pass
    with pytest.raises(AssertionError, match="again"):
        KernelObjects().get(*jobs[0])


@pytest.mark.parametrize(
    ("how", "kind", "text"),
    [
        ("refuses", "unsupported", "no code for it"),
        ("fails", "internal", "ZeroDivisionError: by zero"),
        ("dies", "internal", "ended with status -9"),
    ],
)
def test_trouble_of_a_worker_is_told(tmp_path: Path, how: str, kind: str, text: str) -> None:
    store = KernelObjects()
    job = (Troubled(str(tmp_path / "pid"), how), ISAS["avx2"])
    with pytest.raises(XllmError, match=text) as caught, store.compiling([(NORMS[0], ISAS["avx2"]), job], 2):
        pass
    assert caught.value.kind == kind
    assert int((tmp_path / "pid").read_text()) != os.getpid()


def test_a_full_disk_is_told_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LLVM would end the process with a message of its own; the file that it writes is in memory."""
    write = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        return write(Path("/dev/full") if path.suffix == ".o" else path, data)

    monkeypatch.setattr(Path, "write_bytes", full)  # the workers are forks, and inherit it
    jobs = [(norm, ISAS["avx2"]) for norm in NORMS]
    with pytest.raises(OSError, match="No space left") as caught, KernelObjects().compiling(jobs, 2):
        pass
    assert caught.value.errno == errno.ENOSPC


def test_workers_end_with_the_body(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    began = time.monotonic()
    with pytest.raises(KeyError), KernelObjects().compiling([(Troubled(str(path), "sleeps"), ISAS["avx2"])], 1):
        while not path.exists() or not path.read_text():
            time.sleep(0.01)
        raise KeyError
    assert time.monotonic() - began < 30


_COMPILE = """
import sys, time, fcntl
sys.path.insert(0, {here!r})
from test_objects import Troubled
from xllm_compiler.kernels.tir.isa.levels import ISAS
from xllm_compiler.kernels.tir.native.objects import KernelObjects
lock = open({lock!r}, "w")
fcntl.flock(lock, fcntl.LOCK_EX)
with KernelObjects().compiling([(Troubled({path!r}, "hangs"), ISAS["avx2"])], 1):
    time.sleep(60)
"""


def test_the_workers_of_a_killed_compile_end_with_it_and_let_go_of_its_locks(tmp_path: Path) -> None:
    path, lock = tmp_path / "pid", tmp_path / "lock"
    here = str(Path(__file__).parent)
    text = _COMPILE.format(here=here, lock=str(lock), path=str(path))
    compiling = subprocess.Popen([sys.executable, "-c", text])
    try:
        deadline = time.monotonic() + 60
        while not (path.exists() and path.read_text()):
            assert time.monotonic() < deadline and compiling.poll() is None
            time.sleep(0.05)
    finally:
        compiling.kill()
        compiling.wait()
    with lock.open("w") as again:
        deadline = time.monotonic() + 10
        while True:
            try:
                fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                assert time.monotonic() < deadline, "a worker holds the lock"
                time.sleep(0.05)
