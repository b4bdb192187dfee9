"""Choosing code for this machine, against made-up /proc/cpuinfo texts."""

from __future__ import annotations

import itertools
import platform

import pytest

from xllm_compiler.artifact.cpu_isa import CPU_FLAGS, LEVELS, choose_isa, machine_isas
from xllm_compiler.errors import XllmError

X86, ARM = CPU_FLAGS["x86_64"], CPU_FLAGS["aarch64"]
ASIDE = "avx_vnni"
"""What client processors have, and servers before Sapphire Rapids have not."""
ALL = [(machine, isa) for machine, levels in CPU_FLAGS.items() for isa in levels]


def cpuinfo(*cores: tuple[str, ...], name: str = "flags") -> str:
    return "\n".join(f"processor\t: {i}\n{name}\t\t: fpu sse {' '.join(core)}\n" for i, core in enumerate(cores))


@pytest.mark.parametrize("machine", CPU_FLAGS)
def test_levels_are_nested(machine: str) -> None:
    sets = [set(flags) for isa, flags in CPU_FLAGS[machine].items() if isa != ASIDE]
    assert all(low < high for low, high in itertools.pairwise(sets))
    assert set(X86["avx2"]) < set(X86[ASIDE])


@pytest.mark.parametrize(("machine", "isa"), ALL)
def test_best_level_of_a_machine(machine: str, isa: str) -> None:
    levels = tuple(level for level in CPU_FLAGS[machine] if level in (isa, "avx2") or level != ASIDE)
    text = cpuinfo(CPU_FLAGS[machine][isa], name={"x86_64": "flags", "aarch64": "Features"}[machine])
    assert machine_isas(text, machine) == levels[: levels.index(isa) + 1]
    assert choose_isa(LEVELS, text, machine) == isa
    assert choose_isa(levels[:1], text, machine) == levels[0]


def test_one_missing_flag_drops_a_level() -> None:
    for flag in X86["avx512_bf16"]:
        text = cpuinfo(tuple(f for f in X86["avx512_bf16"] if f != flag))
        assert "avx512_bf16" not in machine_isas(text, "x86_64")


def test_the_weakest_core_decides() -> None:
    assert machine_isas(cpuinfo(X86["avx512"], X86["avx2"]), "x86_64") == ("avx2",)
    assert machine_isas(cpuinfo(ARM["neon_bf16"], ARM["neon"], name="Features"), "aarch64") == ("neon",)


def test_a_neoverse_n1() -> None:
    """As the kernel prints it on Ampere's Altra and AWS's Graviton 2."""
    text = "processor\t: 0\nBogoMIPS\t: 243.75\nFeatures\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp "
    text += "asimdhp cpuid asimdrdm lrcpc dcpop asimddp\nCPU implementer\t: 0x41\n"
    assert machine_isas(text, "aarch64") == ("neon",)


def test_nothing_fits() -> None:
    with pytest.raises(XllmError, match="avx512 only, and this CPU has avx2") as caught:
        choose_isa(("avx512",), cpuinfo(X86["avx2"]), "x86_64")
    assert caught.value.kind == "artifact"
    with pytest.raises(XllmError, match=r"lacks .*avx2"):
        choose_isa(tuple(X86), cpuinfo(()), "x86_64")
    with pytest.raises(XllmError, match=r"lacks asimddp"):
        choose_isa(LEVELS, cpuinfo(("asimd", "atomics", "asimdrdm", "crc32"), name="Features"), "aarch64")
    with pytest.raises(XllmError, match=r"code for x86_64 \(avx2, .*this machine is aarch64"):
        choose_isa(tuple(X86), cpuinfo(ARM["neon"], name="Features"), "aarch64")
    with pytest.raises(XllmError, match=r"code for x86_64 and aarch64 \(.*this machine is riscv64"):
        choose_isa(LEVELS, "", "riscv64")
    with pytest.raises(XllmError):
        choose_isa((), cpuinfo(X86["avx2"]), "x86_64")


def test_this_machine() -> None:
    here = machine_isas()
    levels = [isa for isa in CPU_FLAGS[platform.machine()] if isa in here or isa != ASIDE]
    assert here == tuple(levels[: len(here)])
