"""Compiled kernels on disk: found by everything that decides their bytes, whole or not at all, never in the way."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from xllm_compiler.kernels.tir.codegen.kernel import Kernel
from xllm_compiler.kernels.tir.isa.levels import ISAS, Isa
from xllm_compiler.kernels.tir.linear.linear import Linear
from xllm_compiler.kernels.tir.native import objects, store
from xllm_compiler.kernels.tir.native.objects import KernelObjects, compile_kernel
from xllm_compiler.kernels.tir.native.store import ObjectStore
from xllm_compiler.kernels.tir.rows.norms import LayerNorm, RmsNorm

NORM = RmsNorm(32, "bf16", 1e-6)
AVX2 = ISAS["avx2"]


@pytest.fixture
def kept(tmp_path: Path) -> ObjectStore:
    """A store with the object of `NORM` in it."""
    made = ObjectStore(tmp_path)
    made.put(NORM, AVX2, b"an object")
    return made


def file_of(root: Path) -> Path:
    (path,) = root.glob("??/*.o")
    return path


def test_what_one_process_compiled_another_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [(norm, ISAS[isa]) for norm in (NORM, LayerNorm(48, "f32", 1e-6)) for isa in ("avx2", "avx512_vnni")]
    with KernelObjects(ObjectStore(tmp_path)).compiling(jobs, 2):
        pass
    expected = {job: compile_kernel(job[0], job[0].level(job[1])) for job in jobs}

    def none(kernel: Kernel, isa: Isa) -> bytes:
        raise AssertionError(f"{kernel.symbol} again")

    monkeypatch.setattr(objects, "compile_kernel", none)
    another = KernelObjects(ObjectStore(tmp_path))
    with another.compiling(jobs, 2):
        pass
    assert {job: another.get(*job) for job in jobs} == expected
    assert another.store is not None and (another.store.hits, another.store.misses) == (len(jobs), 0)
    with pytest.raises(AssertionError, match="again"):
        another.get(replace(NORM, n=40), AVX2)


@pytest.mark.parametrize(
    ("kernel", "isa"),
    [
        (replace(NORM, eps=1e-5), AVX2),
        (replace(NORM, n=33), AVX2),
        (LayerNorm(32, "bf16", 1e-6), AVX2),
        (NORM, ISAS["avx512"]),
        (NORM, replace(AVX2, features=("+fma",))),
        (NORM, replace(AVX2, slice_bytes=64)),
    ],
)
def test_another_kernel_or_level_is_another_object(kept: ObjectStore, kernel: Kernel, isa: Isa) -> None:
    assert kept.get(NORM, AVX2) == b"an object"
    assert kept.get(kernel, isa) is None


def test_a_changed_source_is_noticed_by_what_reaches_it_and_by_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All code builds on `builder` and comes from the code generator; nothing here needs `attend`."""
    root = Path(store.__file__).resolve().parents[3]
    folders = (root / "kernels", root / "xllm_compiler")
    texts = {path: path.read_bytes() for folder in folders for path in folder.rglob("*.py")}
    monkeypatch.setattr(Path, "read_bytes", lambda self: texts[self])
    layer = Linear(64, 64, "bf16", "bf16")
    for changed, norm, linear in (
        ("kernels/tir/attention/attend.py", True, True),
        ("kernels/tir/codegen/builder.py", False, False),
        ("kernels/tir/native/objects.py", False, False),
        ("kernels/tir/linear/l1_slices.py", True, False),
        ("kernels/tir/rows/norms.py", False, False),
        ("xllm_compiler/weight_formats.py", True, False),
        ("xllm_compiler/ir/quant.py", True, True),
    ):
        store._sources.cache_clear()
        kept = ObjectStore(tmp_path / changed.replace("/", "-"))
        kept.put(NORM, AVX2, b"norm")
        kept.put(layer, AVX2, b"linear")
        path = root / changed
        before, texts[path] = texts[path], texts[path] + b"\n# changed"
        store._sources.cache_clear()
        assert (kept.get(NORM, AVX2) is not None, kept.get(layer, AVX2) is not None) == (norm, linear), changed
        texts[path] = before
    store._sources.cache_clear()


def test_another_tvm_compiles_anew(kept: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_tvm_version", lambda: "0.99")
    assert kept.get(NORM, AVX2) is None


@dataclass(frozen=True)
class Foreign(Kernel):
    """A kernel whose source nobody watches."""

    @property
    def args(self) -> Any:
        return ()

    def build(self, isa: Isa) -> Any:
        raise AssertionError


def test_kernels_from_elsewhere_are_not_kept(tmp_path: Path) -> None:
    made = ObjectStore(tmp_path)
    made.put(Foreign(), AVX2, b"an object")
    assert made.get(Foreign(), AVX2) is None and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "longer"])
def test_a_damaged_object_is_not_used_and_made_again(tmp_path: Path, kept: ObjectStore, damage: str) -> None:
    path = file_of(tmp_path)
    data = path.read_bytes()
    path.write_bytes(
        {"flipped": data[:-1] + bytes([data[-1] ^ 1]), "cut": data[:-1], "empty": b"", "longer": data + b"x"}[damage]
    )
    found = KernelObjects(kept).get(NORM, AVX2)
    assert found == compile_kernel(NORM, AVX2)
    assert kept.failures == 1 and "damaged" in kept.last_failure
    assert kept.get(NORM, AVX2) == found


@pytest.mark.parametrize("how", ["a file stands there", "no entry may be made"])
def test_a_store_that_cannot_be_written_costs_time_only(tmp_path: Path, how: str) -> None:
    root = tmp_path / "kernels"
    if how == "a file stands there":
        root.write_text("")
    else:
        root = Path("/proc/kernels")
    made = ObjectStore(root)
    assert KernelObjects(made).get(NORM, AVX2) == compile_kernel(NORM, AVX2)
    assert made.failures and made.last_failure


def test_readers_never_see_half_an_object(tmp_path: Path) -> None:
    big = os.urandom(1 << 20)
    done = threading.Event()
    seen: list[bytes | None] = []
    reader = ObjectStore(tmp_path)

    def read() -> None:
        while not done.is_set():
            seen.append(reader.get(NORM, AVX2))

    thread = threading.Thread(target=read)
    thread.start()
    for _ in range(40):
        ObjectStore(tmp_path).put(NORM, AVX2, big)
    done.set()
    thread.join()
    assert set(seen) <= {None, big} and reader.failures == 0
    assert [path.suffix for path in tmp_path.glob("??/*")] == [".o"]


def test_what_nobody_asks_for_is_removed_and_what_is_used_stays(tmp_path: Path, kept: ObjectStore) -> None:
    old = time.time() - 40 * 86_400
    used = file_of(tmp_path)
    os.utime(used, (old, old))
    assert kept.get(NORM, AVX2) == b"an object"  # asked for: young again
    unused, draft = tmp_path / "aa" / "unused.o", tmp_path / "aa" / "draft.tmp"
    unused.parent.mkdir(exist_ok=True)
    for path in (unused, draft):
        path.write_bytes(b"")
        os.utime(path, (old, old))
    ObjectStore(tmp_path).put(replace(NORM, n=40), AVX2, b"another")
    assert used.exists() and not unused.exists() and not draft.exists()
