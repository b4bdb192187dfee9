"""Places barriers between kernels that touch the same bytes.

Kernels between two barriers run in any order and interleaving, so no two of them may conflict. Inside one kernel,
members write disjoint parts. A barrier is needed before a kernel that reads or writes what a kernel since the last
barrier wrote, or that writes what one of them read.
"""

from __future__ import annotations

from collections.abc import Sequence

from xllm_compiler.lowering.kernel_registry import Call
from xllm_compiler.lowering.storage import Ref, Storage


def barriers(calls: Sequence[Call], storage: Storage) -> list[bool]:
    """For every call, whether a barrier stands before it."""
    out: list[bool] = []
    reads: list[Ref] = []
    writes: list[Ref] = []

    def touches(places: Sequence[Ref], others: Sequence[Ref]) -> bool:
        return any(storage.overlap(a, b) for a in places for b in others)

    for call in calls:
        needed = touches(call.reads, writes) or touches(call.writes, writes) or touches(call.writes, reads)
        if needed:
            reads, writes = [], []
        out.append(needed)
        reads += call.reads
        writes += call.writes
    return out
