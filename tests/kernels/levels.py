"""Levels of this machine, and types, that kernels are tested with.

The lowest and the highest level stand in every run. Those between share most of their code with one of these; they are
marked slow, so `make test-all` has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from xllm_compiler.artifact.cpu_isa import machine_isas
from xllm_compiler.kernels.tir.isa.levels import ISAS, Isa


def tiered(cases: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Parameters from the lowest level to the highest: the first and the last in every run, those between marked."""
    last = len(cases) - 1
    return [pytest.param(*case, marks=pytest.mark.slow if 0 < i < last else ()) for i, case in enumerate(cases)]


def _new_in_f32(isa: str) -> bool:
    """Not where only dot products of bf16 or bytes are new: f32 code is that of the level before."""
    return not ISAS[isa].has_bf16_dot and not ISAS[isa].without_int8_dot


def _byte_levels() -> list[Isa]:
    levels = [ISAS[isa] for isa in machine_isas()]
    if "avx512_vnni" in machine_isas() and "avx_vnni" not in machine_isas():
        # servers have the instruction in another encoding
        levels.insert(1, replace(ISAS["avx_vnni"], name="avx_vnni, re-encoded", features=("+avx512vnni", "+avx512vl")))
    return levels


LEVELS = tiered([(isa,) for isa in machine_isas()])
ISA_TYPES = [
    *tiered([(isa, "bf16") for isa in machine_isas()]),
    *tiered([(isa, "f32") for isa in machine_isas() if _new_in_f32(isa)]),
]
BYTE_LEVELS = _byte_levels()
"""What multiplies bytes, `avx_vnni` too, which no machine with AVX-512 of its time has."""
TIERED_BYTE_LEVELS = tiered([(level,) for level in BYTE_LEVELS])
