"""Levels of this machine, and types, that kernels are tested with."""

from __future__ import annotations

from xllm_compiler.artifact.cpu_isa import machine_isas
from xllm_compiler.kernels.tir.base import ISAS


def _new_in_f32(isa: str) -> bool:
    """Not where only dot products of bf16 or bytes are new: f32 code is that of the level before."""
    return not ISAS[isa].has_bf16_dot and not ISAS[isa].without_int8_dot


ISA_TYPES = [(isa, dtype) for isa in machine_isas() for dtype in ("bf16", "f32") if dtype == "bf16" or _new_in_f32(isa)]
