"""Code for 64-bit Arm: what the libraries are and, run by qemu, the tests that this machine's own levels pass."""

from __future__ import annotations

import importlib.util
import platform
import re
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from arm import PROCESSORS, Emulated
from tvm.tirx.script.builder import ir as T

from xllm_compiler.artifact.cpu_isa import machine_isas, machine_levels
from xllm_compiler.kernels.tir.codegen.builder import address, build_function
from xllm_compiler.kernels.tir.codegen.kernel import MEMBER_ARGS, Arg, Kernel
from xllm_compiler.kernels.tir.isa.levels import ISAS, Isa
from xllm_compiler.kernels.tir.native.standalone import Standalone

LEVELS = machine_levels("aarch64")
EXPORTED = {"xllm_fn_all", "xllm_team_join", "xllm_team_run", "xllm_team_stop", "xllm_team_ticks"}

pytestmark = pytest.mark.skipif(platform.machine() == "aarch64", reason="the other tests run these levels themselves")


@dataclass(frozen=True)
class Barriers(Kernel):
    """100 phases: each member adds 1 to its own counter, and all must agree after every barrier."""

    @property
    def args(self) -> tuple[Arg, ...]:
        return (Arg("counters", "i64", written=True), Arg("barrier", "u8", written=True), *MEMBER_ARGS)

    def build(self, isa: Isa) -> Any:
        def body(counters: Any, barrier: Any, member: Any, team: Any) -> None:
            def meet() -> None:
                T.evaluate(T.call_extern("int32", "xllm_team_barrier", address(barrier, 0), team))

            with T.serial(0, 100):
                T.buffer_store(counters, counters[member] + 1, [member])
                meet()
                with T.serial(0, team) as other, T.If(counters[other] != counters[member]), T.Then():
                    T.buffer_store(counters, counters[63] + 1, [63])
                meet()

        return build_function(self, isa, body)


def load(name: str) -> ModuleType:
    """A test module of this folder."""
    spec = importlib.util.spec_from_file_location(f"on_arm_{name}", Path(__file__).parent / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def standalone(kernel: Kernel, isa: Isa) -> Any:
    return (Standalone if isa.machine == platform.machine() else Emulated)(kernel, isa)


def run(monkeypatch: pytest.MonkeyPatch, module: str, test: str, *cases: tuple[Any, ...]) -> None:
    """Runs a test of another module with each of `cases`, kernels for Arm under qemu."""
    there = load(module)
    monkeypatch.setattr(there, "Standalone", standalone)
    for case in cases:
        getattr(there, test)(*case)


def words(data: bytes) -> np.ndarray:
    """The instructions in an ELF file's executable sections."""
    (sections,) = struct.unpack_from("<Q", data, 0x28)
    size, count = struct.unpack_from("<HH", data, 0x3A)
    found = []
    for i in range(count):
        _, _, flags, _, offset, length = struct.unpack_from("<IIQQQQ", data, sections + i * size)
        if flags & 4:
            found.append(np.frombuffer(data, "<u4", length // 4, offset))
    return np.concatenate(found)


# Arm Architecture Reference Manual, C4.1: vector forms of 128 bits; mask and value of the opcode
INSTRUCTIONS = {
    "fmla": [(0xFFE0FC00, 0x4E20CC00), (0xFFC0F400, 0x4F801000)],
    "sdot": [(0xFFE0FC00, 0x4E809400), (0xFFC0F400, 0x4F80E000)],
    "usdot": [(0xFFE0FC00, 0x4E809C00), (0xFFC0F400, 0x4F00F000)],
    "bfdot": [(0xFFE0FC00, 0x6E40FC00), (0xFFC0F400, 0x4F40F000)],
}


@pytest.mark.parametrize("isa", LEVELS)
def test_a_library_is_for_arm_and_has_its_level_s_instructions(isa: str, tmp_path: Path) -> None:
    native = load("test_native")
    paths = [tmp_path / "a.so", tmp_path / "b.so"]
    for path in paths:
        native.write_library(isa, path, native.KERNELS)
    data = paths[0].read_bytes()
    assert data == paths[1].read_bytes()
    assert data[:4] == b"\x7fELF" and struct.unpack_from("<HH", data, 16) == (3, 183)  # ET_DYN, EM_AARCH64
    assert set(re.findall(r"xllm_[a-z_]+", data.decode("latin-1"))) == EXPORTED
    assert b"libc" not in data and b"libm" not in data
    code = words(data)
    has = {name for name, forms in INSTRUCTIONS.items() for mask, value in forms if ((code & mask) == value).any()}
    assert has == {"neon": {"fmla", "sdot"}, "neon_bf16": {"fmla", "sdot", "usdot", "bfdot"}}[isa]


@pytest.mark.slow
@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_float_kernels(isa: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run(
        monkeypatch,
        "test_linear",
        "test_linear",
        (isa, dtype, 64, 192, False, True, "gelu_tanh"),
        (isa, dtype, 37, 100, True, False, "silu"),
        (isa, dtype, 1, 1, True, True, "none"),
    )
    run(monkeypatch, "test_linear", "test_linear_glu", (isa, dtype, 33, 40, True))
    run(monkeypatch, "test_rows", "test_rms_norms", (isa, dtype, 5), (isa, dtype, 100))
    run(monkeypatch, "test_rows", "test_layer_norm", (isa, dtype, 100, True, True))
    run(monkeypatch, "test_rows", "test_embedding_copies_rows_and_panels", (isa, dtype, 37))
    run(monkeypatch, "test_rows", "test_rope", (isa, dtype, 64, 64, "half"), (isa, dtype, 20, 12, "interleaved"))


@pytest.mark.slow
@pytest.mark.parametrize("team", [1, 3])
def test_work_stealing(team: int) -> None:
    tests = load("test_work_stealing")
    tests.test_every_piece_is_done_once(standalone(tests.Pieces(), ISAS[LEVELS[0]]), team)


@pytest.mark.slow
@pytest.mark.parametrize("isa", LEVELS)
def test_quantized_kernels(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run(
        monkeypatch,
        "test_quantized",
        "test_rows_are_quantized_as_numpy_would",
        *((isa, form, k) for form in ("q8", "q4g32") for k in (1, 37, 200)),
    )
    run(monkeypatch, "test_quantized", "test_a_row_that_is_not_finite_says_so", (isa,))
    run(
        monkeypatch,
        "test_quantized",
        "test_linear",
        *(
            (isa, form, k, n)
            for form in ("q8", "q4g32", "q4g32z", "q8g32", "q4grid32")
            for k, n in ((64, 192), (37, 100))
        ),
    )
    run(monkeypatch, "test_quantized", "test_linear_glu", (ISAS[isa], "q4g32"))
    run(monkeypatch, "test_weight_only", "test_linear", (isa, "q8", "bf16", 37, 100), (isa, "q4g64", "f32", 64, 192))


@pytest.mark.slow
@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_attention_and_its_cache(isa: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run(
        monkeypatch,
        "test_kv_append",
        "test_append",
        (isa, dtype, 4, 2, 64, 64, 64, "half", True),
        (isa, dtype, 6, 3, 20, 34, 12, "interleaved", False),
    )
    import attend_case

    monkeypatch.setattr(attend_case, "Standalone", standalone)
    attend = load("test_attend")
    attend.test_attend(isa, dtype, 4, 2, 64, 64, {})
    attend.test_attend(isa, dtype, 6, 1, 20, 34, {"window": 37, "sinks": True})
    attend.test_attend(isa, dtype, 7, 1, 32, 66, {"quantized": True, "softcap": 5.0})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["exp", "tanh", "erf", "silu"])
def test_functions_give_the_bits_of_this_machine(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    there = load("test_vmath")
    monkeypatch.setattr(there, "Standalone", standalone)
    monkeypatch.setattr(there, "machine_isas", lambda: (*LEVELS, *machine_isas()[:1]))
    there.test_error_and_bits(*next(case for case in there.CASES if case[0] == name))


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 5])
def test_barriers(size: int) -> None:
    """As tests/kernels/test_native.py: no member is ahead of another when all have passed a barrier."""
    counters = np.zeros(64, np.int64)
    emulated = Emulated(Barriers(), ISAS["neon"])
    for _ in range(3):
        emulated(counters, np.zeros(64, np.uint8), team=size)
    assert (counters[:size] == 300).all() and counters[63] == 0


def test_every_level_has_a_processor_to_run_on() -> None:
    assert tuple(PROCESSORS) == LEVELS
