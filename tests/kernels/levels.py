"""Levels of this machine, and types, that kernels are tested with."""

from __future__ import annotations

from dataclasses import replace

from xllm_compiler.artifact.cpu_isa import machine_isas
from xllm_compiler.kernels.tir.isa.levels import ISAS, Isa


def _new_in_f32(isa: str) -> bool:
    """Not where only dot products of bf16 or bytes are new: f32 code is that of the level before."""
    return not ISAS[isa].has_bf16_dot and not ISAS[isa].without_int8_dot


def _byte_levels() -> list[Isa]:
    levels = [ISAS[isa] for isa in machine_isas()]
    if "avx512_vnni" in machine_isas() and "avx_vnni" not in machine_isas():
        # servers have the instruction in another encoding
        levels.append(replace(ISAS["avx_vnni"], name="avx_vnni, re-encoded", features=("+avx512vnni", "+avx512vl")))
    return levels


ISA_TYPES = [(isa, dtype) for isa in machine_isas() for dtype in ("bf16", "f32") if dtype == "bf16" or _new_in_f32(isa)]
BYTE_LEVELS = _byte_levels()
"""What multiplies bytes, `avx_vnni` too, which no machine with AVX-512 of its time has."""
