"""What this process may use of the machine: affinity, cgroups (v1 and v2), memory, huge pages. Decides nothing."""

from __future__ import annotations

import errno
import math
import mmap
import os
import re
from collections.abc import Iterator
from pathlib import Path

from xllm_compiler.artifact.schema import HUGE_PAGE
from xllm_compiler.errors import XllmError

_ROOT = Path("/")
_UNLIMITED = 1 << 60  # cgroup v1 spells "no limit" as a huge number


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _cgroup_folders(root: Path, controller: str) -> Iterator[tuple[int, Path]]:
    """(version, folder) of this process's cgroup and of all above it: a limit anywhere on the way binds."""
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if names == "":
            version, base = 2, root / "sys/fs/cgroup"
            if not (base / "cgroup.controllers").exists():
                base = base / "unified"
        elif controller in names.split(","):
            version, base = 1, root / "sys/fs/cgroup" / controller
        else:
            continue
        # Inside a container the path is the host's, and the mount shows only our part: try the whole and then its top.
        folder = base / path.lstrip("/")
        yield version, folder
        while folder != base:
            folder = folder.parent
            yield version, folder


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.lstrip("-").isdigit() else None


def cpu_quota(root: Path = _ROOT) -> float | None:
    """CPUs that the cgroup lets us use, such as 1.5; None without a limit."""
    found: list[float] = []
    for version, folder in _cgroup_folders(root, "cpu"):
        if version == 2:
            quota, _, period = (_read(folder / "cpu.max") or "").partition(" ")
        else:
            quota, period = _read(folder / "cpu.cfs_quota_us") or "", _read(folder / "cpu.cfs_period_us") or ""
        used, of = _number(quota), _number(period)
        if used is not None and of is not None and used > 0 and of > 0:
            found.append(used / of)
    return min(found, default=None)


def default_threads(root: Path = _ROOT) -> int:
    """How many threads to use: the CPUs that we may run on, at most the quota rounded up.

    The system would stop a wider team in the middle of a step, and all members would wait for one.
    """
    cpus = len(os.sched_getaffinity(0))
    quota = cpu_quota(root)
    return max(1, cpus if quota is None else min(cpus, math.ceil(quota - 1e-6)))


def available_memory(root: Path = _ROOT) -> int:
    """Bytes that this process can still take: the kernel's estimate, at most what any cgroup above leaves."""
    available: int | None = None
    for line in (_read(root / "proc/meminfo") or "").splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            available = int(rest.split()[0]) << 10
    if available is None:
        raise XllmError(
            "io",
            "cannot tell how much memory is available",
            where="/proc/meminfo",
            help="set the size of the KV cache: --kv-cache-memory-bytes",
        )
    for version, folder in _cgroup_folders(root, "memory"):
        names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        limit, used = (_number(_read(folder / name)) for name in names)
        if limit is None or used is None or limit >= _UNLIMITED:
            continue
        # File pages count as used but are given back on demand.
        available = min(available, limit - max(0, used - _reclaimable(folder)))
    return max(0, available)


def _reclaimable(folder: Path) -> int:
    """Bytes of file pages in a memory group and those below it."""
    found: dict[str, int] = {}
    for line in (_read(folder / "memory.stat") or "").splitlines():
        name, _, value = line.partition(" ")
        found[name] = _number(value) or 0
    # The plain figures of v1 leave out the groups below, which its usage counts; v2 has only plain ones, of all.
    prefix = "total_" if "total_active_file" in found else ""
    return found.get(prefix + "active_file", 0) + found.get(prefix + "inactive_file", 0)


def prefer_huge_pages(memory: mmap.mmap) -> None:
    """Ask for `memory` in pages of 2 MiB instead of 4 KiB.

    They are looked up less often: reading a step's weights is 6 to 7 % faster. A file gets them when it is read from
    the disk, or was written in whole blocks (pack.py). The system gives what it can.
    """
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None or len(memory) < HUGE_PAGE:
        return
    try:
        memory.madvise(advice)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a Linux without them
            raise


def huge_bytes(address: int, root: Path = _ROOT) -> int:
    """Bytes of the mapping at `address` that are in huge pages; 0 where that cannot be read."""
    inside, kilobytes = False, 0
    for line in (_read(root / "proc/self/smaps") or "").splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith(("FilePmdMapped:", "AnonHugePages:")):
            kilobytes += int(line.split()[1])
    return kilobytes << 10
