"""What the machine code may contain, that it is the same every time, and the team that runs it."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tvm.tirx.script.builder import ir as T

from xllm_compiler.errors import XllmError
from xllm_compiler.kernels.tir.attention.attend import Attend
from xllm_compiler.kernels.tir.attention.kv_address import KvLayout
from xllm_compiler.kernels.tir.attention.kv_append import KvAppend
from xllm_compiler.kernels.tir.codegen.kernel import Kernel
from xllm_compiler.kernels.tir.isa.levels import ISAS
from xllm_compiler.kernels.tir.linear.linear import Linear, LinearGlu
from xllm_compiler.kernels.tir.linear.vocab import LinearBlockMax
from xllm_compiler.kernels.tir.native.linker import find_linker
from xllm_compiler.kernels.tir.native.module import NativeModule
from xllm_compiler.kernels.tir.native.standalone import Team, aligned
from xllm_compiler.kernels.tir.rows.norms import AddRmsNorm, RmsNorm

KERNELS: list[Kernel] = [
    Linear(48, 70, "bf16", "bf16", True, True, "gelu"),
    LinearGlu(48, 40, "f32"),
    RmsNorm(40, "bf16", 1e-6),
    KvAppend(KvLayout("bf16", 1, 32, 32), 2, 32, "half", True, True),
    Attend(KvLayout("bf16", 1, 32, 40), 2, 0.2),
    Linear(64, 64, "bf16", "bf16", weights="q4g32"),
    LinearBlockMax(64, 64, "bf16", weights="q8"),
    Attend(KvLayout("bf16", 1, 32, 32, quantized=True), 2, 0.2),
]


def write_library(isa: str, path: Path, kernels: list[Kernel]) -> None:
    module = NativeModule(ISAS[isa])
    with module.entry("xllm_fn_all") as (args, member, team):
        for kernel in kernels:
            count = len(kernel.args) - 2
            values = [args[i] if kernel.args[i].pointer else T.Cast("int32", args[i]) for i in range(count)]
            module.call(kernel, values, member, team)
            module.barrier(args[0], team)
    module.write_shared(path)


def disassemble(path: Path) -> str:
    return subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", path], capture_output=True, text=True, check=True
    ).stdout


def test_each_level_uses_only_its_own_instructions(tmp_path: Path) -> None:
    wide = r"%zmm|%[xyz]mm(1[6-9]|2\d|3[01])|%k[0-7]"
    newer = r"vdpbf16ps|vcvtne2?ps2bf16|vpdpbusd|vpdpwssd|vp2intersect|v4fmadd|tdp"
    forbidden = {
        "avx2": f"{wide}|{newer}",
        "avx_vnni": f"{wide}|{newer.replace('vpdpbusd|', '')}",
        "avx512": newer,
        "avx512_vnni": "vdpbf16ps|vcvtne2?ps2bf16|vp2intersect|v4fmadd|tdp",
        "avx512_bf16": "vp2intersect|v4fmadd|tdp",
        "amx": "vp2intersect",
    }
    expected = {
        "avx2": "vfmadd",
        "avx_vnni": r"\{vex\} vpdpbusd",
        "avx512": "%zmm",
        "avx512_vnni": "vpdpbusd",
        "avx512_bf16": "vdpbf16ps",
        "amx": "tdpbf16ps",
    }
    assert expected.keys() == {isa.name for isa in ISAS.values() if isa.machine == "x86_64"}
    for isa in expected:
        path = tmp_path / f"{isa}.so"
        write_library(isa, path, KERNELS)
        text = disassemble(path)
        assert re.search(expected[isa], text), isa
        found = re.search(f".*({forbidden[isa]}).*", text)
        assert found is None, (isa, found and found.group())


def test_kernels_know_whether_they_multiply_bytes(tmp_path: Path) -> None:
    """What says no shares its code with the level without that dot product."""
    said = {kernel.symbol: kernel.int8_dots for kernel in KERNELS}
    assert set(said.values()) == {True, False}
    for number, kernel in enumerate(KERNELS):
        path = tmp_path / f"{number}.so"
        write_library("avx512_vnni", path, [kernel])
        assert ("vpdpbusd" in disassemble(path)) == said[kernel.symbol], kernel.symbol


@pytest.mark.parametrize("kernel", [Linear(1024, 128, "bf16", "bf16"), LinearGlu(1024, 128, "bf16", "gelu_tanh")])
def test_no_spills_in_the_hot_loop(tmp_path: Path, kernel: Kernel) -> None:
    path = tmp_path / "linear.so"
    write_library("avx512_bf16", path, [kernel])
    lines = disassemble(path).splitlines()
    dots = [i for i, line in enumerate(lines) if "vdpbf16ps" in line]
    assert len(dots) >= 84  # (1 + ... + 6 rows) x 4 vectors
    for first, last in pairwise(dots):
        if last - first < 12:  # within one loop body
            spills = [line for line in lines[first:last] if "(%rsp" in line and "%zmm" in line]
            assert not spills, lines[first : last + 1]


def test_same_bytes_twice_and_no_other_library_needed(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.so", "other-name.so")]
    for path in paths:
        write_library("avx2", path, KERNELS)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    symbols = subprocess.run(["nm", "-D", paths[0]], capture_output=True, text=True, check=True).stdout.split()[2::3]
    assert symbols == ["xllm_fn_all", "xllm_team_join", "xllm_team_run", "xllm_team_stop", "xllm_team_ticks"]
    needed = subprocess.run(["objdump", "-p", paths[0]], capture_output=True, text=True, check=True).stdout
    assert "NEEDED" not in needed


def test_missing_linker_is_an_error_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(XllmError, match="no linker") as error:
        write_library("avx2", tmp_path / "x.so", KERNELS[:1])
    assert error.value.kind == "io"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(XllmError, match="links for riscv64") as error:
        find_linker("riscv64")
    assert "gcc-riscv64-linux-gnu" in error.value.help


def test_symbols_tell_kernels_apart() -> None:
    kernels = [
        RmsNorm(40, "bf16", 1e-6),
        RmsNorm(40, "bf16", 1e-5),
        RmsNorm(40, "bf16", 1e-6, 1.0),
        RmsNorm(40, "bf16", 1e-6, 1.0, False),
        AddRmsNorm(40, "bf16", 1e-6),
        KvAppend(KvLayout("bf16", 2, 32, 32), 2),
        KvAppend(KvLayout("bf16", 2, 32, 32), 2, q_norm=True),
        KvAppend(KvLayout("bf16", 2, 32, 32), 2, k_norm=True),
    ]
    assert len({kernel.symbol for kernel in kernels}) == len(kernels)
    assert all(re.fullmatch(r"[a-z][a-z0-9_]*", kernel.symbol) for kernel in kernels)


@pytest.fixture(scope="module")
def barriers(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """A step of 100 phases: each member adds 1 to its own counter, and all must agree after every barrier."""
    path = tmp_path_factory.mktemp("team") / "barriers.so"
    module = NativeModule(ISAS["avx2"])
    with module.entry("xllm_fn_count") as (args, member, team):
        counters = T.decl_buffer((64,), "int64", data=T.bind(T.reinterpret("handle", args[1])))
        with T.serial(0, 100):
            T.buffer_store(counters, counters[member] + 1, [member])
            module.barrier(args[0], team)
            with T.serial(0, team) as other, T.If(counters[other] != counters[member]), T.Then():
                T.buffer_store(counters, counters[63] + 1, [63])
            module.barrier(args[0], team)
    module.write_shared(path)
    return ctypes.CDLL(str(path))


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_barriers_hold_and_nobody_stalls(barriers: ctypes.CDLL, size: int) -> None:
    counters, barrier = aligned((64,), np.int64), aligned((64,), np.uint8)
    args = (ctypes.c_int64 * 2)(barrier.ctypes.data, counters.ctypes.data)
    runs = 30
    begin = time.perf_counter()
    with Team(barriers, size) as team:
        for i in range(runs):
            assert team.run(barriers.xllm_fn_count, args) == 0
            if i % 10 == 0:
                time.sleep(0.002)  # long enough for everybody to fall asleep
    assert (counters[:size] == 100 * runs).all() and counters[63] == 0
    # 6,000 barriers; a member that waits in vain for a core costs a time slice, not seconds
    assert time.perf_counter() - begin < 20 * max(1, size / (os.cpu_count() or 1))


def test_status_of_any_member_comes_back(barriers: ctypes.CDLL) -> None:
    step = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32)
    args = (ctypes.c_int64 * 1)()
    with Team(barriers, 3) as team:
        assert team.run(step(lambda args, member, size: 0), args) == 0
        assert team.run(step(lambda args, member, size: 5 if member == 2 else 0), args) == 5
        assert team.run(step(lambda args, member, size: 7 if member == 0 else 0), args) == 7
        assert team.run(step(lambda args, member, size: size - 3), args) == 0
