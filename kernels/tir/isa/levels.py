"""Instruction set levels: what code is compiled for, and what kernels need to know of a level."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

LANES = 16  # one logical vector: 16 f32, whatever the machine's registers hold; so that all levels add in one order


@dataclass(frozen=True)
class Isa:
    """An instruction set level that code is compiled for.

    `machine` is the kernel's name of the architecture, as in `platform.machine()`; `mcpu` and `features` are LLVM's
    names; `vector_registers` counts registers of `register_lanes` f32 each.
    """

    name: str
    machine: str
    mcpu: str
    features: tuple[str, ...]
    register_lanes: int
    vector_registers: int
    has_bf16_dot: bool
    has_int8_dot: bool
    has_amx: bool = False  # Intel AMX: eight registers of 16 rows of 64 bytes, and their dot products
    without_int8_dot: str = ""  # the level to which this one adds the 8-bit dot product and nothing else
    streamed_rows: int = 0  # up to so many rows, the processor's own prefetcher is faster than prefetch instructions
    slice_bytes: int = 0  # of a slice of 8-bit weights in the first-level cache; 0: the second level is fast enough

    def target(self) -> dict[str, Any]:
        """The TVM target description: nothing in it depends on the machine that compiles."""
        return {
            "kind": "llvm",
            "mtriple": f"{self.machine}-unknown-linux-gnu",
            "mcpu": self.mcpu,
            "mattr": list(self.features),
            "num-cores": 1,
            # Else LLVM keeps the constants of an activation's polynomial in registers during the dot products before
            # it, and spills accumulators for them. That halves the speed of a gated linear layer.
            "cl-opt": ["-disable-machine-licm:bool=true"],
        }


_VNNI = ("+avx512vnni",)
_DOTS = (*_VNNI, "+avx512bf16")
_TILES = ("+amx-tile", "+amx-bf16", "+amx-int8")
_ARM = ("+v8.2a", "+dotprod")

ISAS: dict[str, Isa] = {
    isa.name: isa
    for isa in (
        Isa("avx2", "x86_64", "x86-64-v3", (), 8, 16, False, False),
        # Intel's client processors from Alder Lake on
        Isa("avx_vnni", "x86_64", "x86-64-v3", ("+avxvnni",), 8, 16, False, True, without_int8_dot="avx2"),
        # Intel from Skylake to Rocket Lake
        Isa("avx512", "x86_64", "x86-64-v4", (), 16, 32, False, False, streamed_rows=2),
        Isa("avx512_vnni", "x86_64", "x86-64-v4", _VNNI, 16, 32, False, True, False, "avx512", 2, 1 << 14),
        Isa("avx512_bf16", "x86_64", "x86-64-v4", _DOTS, 16, 32, True, True),
        Isa("amx", "x86_64", "x86-64-v4", (*_DOTS, *_TILES), 16, 32, True, True, has_amx=True),
        Isa("neon", "aarch64", "generic", _ARM, 4, 32, False, True),
        Isa("neon_bf16", "aarch64", "generic", (*_ARM, "+bf16", "+i8mm"), 4, 32, True, True),
    )
}
