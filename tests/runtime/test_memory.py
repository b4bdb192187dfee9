"""The memory_plan's arithmetic, the reading of cgroups from made-up file trees, and huge pages."""

from __future__ import annotations

import mmap
import os
import re
from pathlib import Path

import numpy as np
import pytest

from xllm_compiler.errors import XllmError
from xllm_compiler.runtime import host
from xllm_compiler.runtime.memory import Fixed, MemoryPlan, decide, show_bytes

MIB = 1 << 20
FIXED = Fixed(weights=100 * MIB, arena=20 * MIB, outputs=10 * MIB, host=2 * MIB)


def memory_plan(available: int | None, kv_bytes: int | None = None, **changes: int) -> MemoryPlan:
    sizes = {"page_bytes": MIB, "page_tokens": 16, "max_model_len": 160, "max_num_seqs": 8, "max_pages": 1 << 24}
    return decide(FIXED, available=available, kv_bytes=kv_bytes, **{**sizes, **changes})


def test_all_entries_fit_the_budget() -> None:
    found = memory_plan(200 * MIB)
    assert found.pages == 48 and found.kv_tokens == 48 * 16
    assert found.total == sum(size for _, size in found.entries()) <= 0.9 * 200 * MIB
    assert found.total + found.page_bytes > 0.9 * 200 * MIB


def test_no_more_pages_than_requests_can_use() -> None:
    assert memory_plan(1 << 40).pages == 8 * 10
    assert memory_plan(1 << 40, max_pages=30).pages == 30
    assert memory_plan(None, kv_bytes=1 << 40).pages == 80


def test_a_cache_that_cannot_hold_one_request_is_refused_with_the_way_out() -> None:
    with pytest.raises(XllmError) as caught:
        memory_plan(155 * MIB)
    assert caught.value.kind == "capacity" and "--max-model-len to at most 112" in caught.value.help
    assert memory_plan(155 * MIB, max_model_len=112).pages == 7
    with pytest.raises(XllmError) as caught:
        memory_plan(100 * MIB)
    assert caught.value.kind == "capacity" and "no KV cache" in caught.value.message


def test_a_given_size_is_taken_as_it_is() -> None:
    assert memory_plan(None, kv_bytes=3 * MIB + 5).pages == 3
    with pytest.raises(XllmError) as caught:
        memory_plan(None, kv_bytes=MIB - 1)
    assert caught.value.kind == "capacity" and str(MIB) in caught.value.help


def test_a_model_without_kv() -> None:
    assert memory_plan(1, page_bytes=0).kv == 0 and memory_plan(1, page_bytes=0).pages == 80


def test_bytes_for_people() -> None:
    assert [show_bytes(n) for n in (5, 2048, 3 * MIB, 5 << 40)] == ["5 B", "2.0 KiB", "3.0 MiB", "5120.0 GiB"]


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    8000 kB\n", **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V2 = {"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/cgroup.controllers": "cpu memory\n"}
V1 = {"proc/self/cgroup": "4:memory:/m\n2:cpu,cpuacct:/c\n0::/\n"}


def test_the_tightest_limit_of_all_groups_above_binds_v2(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        {
            **V2,
            "sys/fs/cgroup/a/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
            "sys/fs/cgroup/a/memory.max": f"{6 * MIB}\n",
            "sys/fs/cgroup/a/memory.current": f"{4 * MIB}\n",
            "sys/fs/cgroup/a/memory.stat": f"anon 5\nactive_file {MIB}\ninactive_file {MIB}\n",
            "sys/fs/cgroup/a/b/memory.max": "max\n",
            "sys/fs/cgroup/a/b/memory.current": "77\n",
        },
    )
    assert host.cpu_quota(root) == 1.5
    assert host.available_memory(root) == 4 * MIB
    assert host.default_threads(root) == min(2, len(os.sched_getaffinity(0)))


def test_limits_of_v1(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        {
            **V1,
            "sys/fs/cgroup/cpu/c/cpu.cfs_quota_us": "50000\n",
            "sys/fs/cgroup/cpu/c/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/m/memory.limit_in_bytes": f"{5 * MIB}\n",
            "sys/fs/cgroup/memory/m/memory.usage_in_bytes": f"{3 * MIB}\n",
            "sys/fs/cgroup/memory/m/memory.stat": f"active_file 1\ntotal_active_file {MIB}\ntotal_inactive_file 0\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "0\n",
        },
    )
    assert host.cpu_quota(root) == 0.5 and host.default_threads(root) == 1
    assert host.available_memory(root) == 3 * MIB


def test_no_limit_is_the_whole_machine(tmp_path: Path) -> None:
    root = tree(tmp_path, {})
    assert host.cpu_quota(root) is None and host.available_memory(root) == 8000 * 1024
    assert host.default_threads(root) == len(os.sched_getaffinity(0))
    unlimited = tree(tmp_path / "v1", {**V1, "sys/fs/cgroup/cpu/c/cpu.cfs_quota_us": "-1\n"})
    assert host.cpu_quota(unlimited) is None
    (root / "proc/meminfo").unlink()
    with pytest.raises(XllmError):
        host.available_memory(root)


def test_a_container_that_sees_only_its_own_mount(tmp_path: Path) -> None:
    """Its path in /proc/self/cgroup is the host's, and what is mounted is its own folder."""
    root = tree(tmp_path, {**V2, "sys/fs/cgroup/cpu.max": "200000 100000\n"})
    assert host.cpu_quota(root) == 2.0


def test_this_machine() -> None:
    assert host.available_memory() > MIB and host.default_threads() >= 1


def test_what_is_in_huge_pages(tmp_path: Path) -> None:
    entry = "{} r--s 00000000 fe:00 42   /a/weights.bin\nRss: 9999 kB\nAnonHugePages: {} kB\nFilePmdMapped: {} kB\n"
    maps = entry.format("7f0000000000-7f0000400000", 0, 4096) + entry.format("7f0000400000-7f0000800000", 2048, 0)
    root = tree(tmp_path, {"proc/self/smaps": maps + entry.format("7f0000800000-7f0000900000", 0, 0)})
    found = [host.huge_bytes(0x7F0000000000 + at, root) for at in (0, 4 * MIB - 1, 4 * MIB, 8 * MIB, 9 * MIB)]
    assert found == [4 * MIB, 4 * MIB, 2 * MIB, 0, 0]
    assert host.huge_bytes(0, tmp_path / "none") == 0


def test_huge_pages_are_asked_for() -> None:
    """Where this Linux has them: what is asked for is in the mapping's flags."""
    with mmap.mmap(-1, 4 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        address = int(np.frombuffer(memory, np.uint8).ctypes.data)
        host.prefer_huge_pages(memory)
        inside, flags = False, ""
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if found := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
                inside = int(found[1], 16) <= address < int(found[2], 16)
            elif inside and line.startswith("VmFlags:"):
                flags = line
    assert ("hg" in flags.split()) == Path("/sys/kernel/mm/transparent_hugepage").exists()
