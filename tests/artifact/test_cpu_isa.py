"""Choosing code for this machine, against made-up /proc/cpuinfo texts."""

from __future__ import annotations

import itertools

import pytest

from xllm_compiler.artifact.cpu_isa import CPU_FLAGS, choose_isa, machine_isas
from xllm_compiler.errors import XllmError

ALL = tuple(CPU_FLAGS)


def cpuinfo(*cores: tuple[str, ...]) -> str:
    return "\n".join(f"processor\t: {i}\nflags\t\t: fpu sse {' '.join(core)}\n" for i, core in enumerate(cores))


def test_levels_are_nested() -> None:
    sets = [set(flags) for flags in CPU_FLAGS.values()]
    assert all(low < high for low, high in itertools.pairwise(sets))


@pytest.mark.parametrize("index", range(len(ALL)))
def test_best_level_of_a_machine(index: int) -> None:
    text = cpuinfo(CPU_FLAGS[ALL[index]])
    assert machine_isas(text, "x86_64") == ALL[: index + 1]
    assert choose_isa(ALL, text, "x86_64") == ALL[index]
    assert choose_isa(("avx2",), text, "x86_64") == "avx2"


def test_one_missing_flag_drops_a_level() -> None:
    for flag in CPU_FLAGS["avx512_bf16"]:
        text = cpuinfo(tuple(f for f in CPU_FLAGS["avx512_bf16"] if f != flag))
        assert "avx512_bf16" not in machine_isas(text, "x86_64")


def test_the_weakest_core_decides() -> None:
    assert machine_isas(cpuinfo(CPU_FLAGS["avx512"], CPU_FLAGS["avx2"]), "x86_64") == ("avx2",)


def test_nothing_fits() -> None:
    with pytest.raises(XllmError, match="avx512 only, and this CPU has avx2") as caught:
        choose_isa(("avx512",), cpuinfo(CPU_FLAGS["avx2"]), "x86_64")
    assert caught.value.kind == "artifact"
    with pytest.raises(XllmError, match=r"lacks .*avx2"):
        choose_isa(ALL, cpuinfo(()), "x86_64")
    with pytest.raises(XllmError, match="this machine is aarch64"):
        choose_isa(ALL, cpuinfo(CPU_FLAGS["avx2"]), "aarch64")
    with pytest.raises(XllmError):
        choose_isa((), cpuinfo(CPU_FLAGS["avx2"]), "x86_64")


def test_this_machine() -> None:
    here = machine_isas()
    assert here == ALL[: len(here)]
