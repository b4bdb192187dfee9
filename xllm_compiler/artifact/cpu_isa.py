"""Which instruction set levels this machine has and which code of an artifact it may run. Owns the list of levels and
what each needs; must not load code."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import platform
from collections.abc import Iterable
from pathlib import Path

from xllm_compiler.errors import XllmError

_AVX2 = ("avx", "avx2", "fma", "f16c", "bmi1", "bmi2", "abm", "movbe")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
_NEON = ("asimd", "atomics", "asimdrdm", "crc32", "asimddp")

CPU_FLAGS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "avx2": _AVX2,
        "avx_vnni": (*_AVX2, "avx_vnni"),
        "avx512": _AVX512,
        "avx512_vnni": (*_AVX512, "avx512_vnni"),
        "avx512_bf16": (*_AVX512, "avx512_vnni", "avx512_bf16"),
        "amx": (*_AVX512, "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8"),
    },
    "aarch64": {
        "neon": _NEON,
        "neon_bf16": (*_NEON, "bf16", "i8mm"),
    },
}
"""By `platform.machine()`, levels from the widest spread to the best, with the /proc/cpuinfo flags that the code of
each may use: x86-64-v3, that with the 8-bit dot product (what Intel's client processors from Alder Lake on have),
x86-64-v4, v4 with the 8-bit dot product, and with that of bf16 too, and that with Intel's matrix tiles; Armv8.2
with the 8-bit dot product (Neoverse N1 and later), and that with those of bf16 and of mixed signs (Armv8.6, Neoverse
V1). Linux lists a flag only where it also saves the registers."""

LEVELS: tuple[str, ...] = tuple(isa for levels in CPU_FLAGS.values() for isa in levels)
"""All of them."""

_FLAG_LINES = {"x86_64": "flags", "aarch64": "Features"}  # what /proc/cpuinfo calls them

_ARCH_REQ_XCOMP_PERM = 0x1023  # asm/prctl.h, Linux 5.16
_XFEATURE_TILE_DATA = 18
_SYS_ARCH_PRCTL = 158

log = logging.getLogger("xllm")


@functools.cache
def tiles_allowed() -> bool:
    """Asks Linux, once for the process and all its threads, for the right to use the tile registers, whose 8 KiB it
    saves only for those who asked. A refusal is logged with its reason."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, ctypes.c_long(_XFEATURE_TILE_DATA)) == 0:
        return True
    log.warning("this CPU has AMX, but the system does not allow its use: %s", os.strerror(ctypes.get_errno()))
    return False


def machine_flags(cpuinfo: str | None = None, machine: str | None = None) -> frozenset[str]:
    """The CPU feature flags that every core of this machine has; `cpuinfo` stands in for /proc/cpuinfo in tests."""
    if cpuinfo is None:
        cpuinfo = _cpuinfo()
    name = _FLAG_LINES.get(machine or platform.machine())
    lines = [line.partition(":") for line in cpuinfo.splitlines()]
    cores = [frozenset(flags.split()) for key, _, flags in lines if key.strip() == name]
    return frozenset.intersection(*cores) if cores else frozenset()


_NAME_LINES = ("model name", "cpu family", "model", "stepping", "CPU implementer", "CPU variant", "CPU part")


def machine_name(cpuinfo: str | None = None) -> str:
    """What this machine's first core calls itself in /proc/cpuinfo: two with one name run code alike."""
    if cpuinfo is None:
        cpuinfo = _cpuinfo()
    lines = [line.partition(":") for line in cpuinfo.split("\n\n")[0].splitlines()]
    found = {key.strip(): value.strip() for key, _, value in lines}
    return ", ".join(f"{key} {found[key]}" for key in _NAME_LINES if key in found) or platform.machine()


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise XllmError("io", f"cannot read this CPU's features: {error.strerror}", where="/proc/cpuinfo") from None


def machine_levels(machine: str | None = None) -> tuple[str, ...]:
    """The levels of this machine's architecture, whether or not it has them itself."""
    return tuple(CPU_FLAGS.get(machine or platform.machine(), {}))


def machine_isas(cpuinfo: str | None = None, machine: str | None = None) -> tuple[str, ...]:
    """The levels that this machine can run, best last. Of the machine itself, no given text, permission to use tiles
    is asked for where it has any."""
    machine = machine or platform.machine()
    flags = machine_flags(cpuinfo, machine)
    levels = [isa for isa, needs in CPU_FLAGS.get(machine, {}).items() if flags.issuperset(needs)]
    if cpuinfo is None and "amx" in levels and not tiles_allowed():
        levels.remove("amx")
    return tuple(levels)


def choose_isa(isas: Iterable[str], cpuinfo: str | None = None, machine: str | None = None) -> str:
    """The best level of an artifact's `isas` that this machine can run. Raises kind "artifact" when there is none, so
    that no process ever dies of an illegal instruction."""
    offered = tuple(isas)
    here = machine_isas(cpuinfo, machine)
    fitting = [isa for isa in here if isa in offered]
    if fitting:
        return fitting[-1]
    name = machine or platform.machine()
    if not set(offered) & set(machine_levels(name)):
        others = " and ".join(other for other, levels in CPU_FLAGS.items() if set(offered) & set(levels))
        message = f"the artifact has code for {others} ({', '.join(offered)}) and this machine is {name}"
    else:
        lowest = next(iter(CPU_FLAGS[name].values()))
        missing = ", ".join(sorted(set(lowest) - machine_flags(cpuinfo, name)))
        message = f"the artifact has code for {', '.join(offered)} only, and this CPU "
        message += f"has {', '.join(here)}" if here else f"lacks {missing}"
    raise XllmError(
        "artifact", message, where="manifest.json: $.target.levels", help="compile the checkpoint for this machine"
    )
