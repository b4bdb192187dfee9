"""Parts of a manifest as text, for the compile report and for `xllm-compile show`. Reads manifests only."""

from __future__ import annotations

import re
from collections.abc import Iterable

from xllm_compiler.artifact import Manifest, Weight
from xllm_compiler.tools.console import size, table

GIB = 1 << 30


def memory_text(manifest: Manifest) -> str:
    """The memory formulas, their values at the limits, and what a KV budget comes to."""
    limits = manifest.limit_values(1)
    memory, kv = manifest.memory, manifest.memory.kv
    arena = manifest.dim(memory.arena).evaluate(limits)
    logits = manifest.dim(memory.logits).evaluate(limits)
    fixed = manifest.weights.bytes + arena + logits
    at = ", ".join(f"{name}={limits[name]}" for name in ("N", "B", "S"))
    rows = [
        ("weights", size(manifest.weights.bytes), "mapped from weights.bin"),
        ("arena", size(arena), memory.arena),
        ("logits", size(logits), memory.logits),
        (
            "kv",
            f"{size(kv.page_bytes)} a page",
            f"{kv.page_bytes}*P, {kv.page_tokens} tokens a page, {len(kv.layers)} layers",
        ),
    ]
    text = f"memory at {at}\n{table(rows, right=(1,))}"
    if not kv.layers:
        return text
    total = GIB
    while total < 2 * fixed + kv.page_bytes:
        total *= 2
    pages = (total - fixed) // kv.page_bytes
    tokens = pages * kv.page_tokens
    longest = -(-manifest.model.max_model_len // kv.page_tokens)
    return (
        f"{text}\n  for example, {size(total)} in all leave {size(total - fixed)} for KV: {pages} pages, {tokens} "
        f"tokens, {pages // longest} requests of {manifest.model.max_model_len} tokens"
    )


def weight_groups(weights: Iterable[Weight]) -> list[tuple[str, Weight, int, int]]:
    """Weights that differ only in the numbers of their names, as (pattern, first, how many, bytes of all)."""
    groups: dict[tuple[str, str, str, tuple[int, ...]], list[Weight]] = {}
    for weight in weights:
        pattern = re.sub(r"\b\d+\b", "*", re.sub(r"#[0-9a-f]{8}", "", weight.name))
        groups.setdefault((pattern, weight.layout, weight.dtype, weight.shape), []).append(weight)
    found = []
    for (pattern, _, _, _), members in groups.items():
        name = members[0].name if len(members) == 1 else pattern
        found.append((name, members[0], len(members), sum(weight.bytes for weight in members)))
    return found


def weights_text(manifest: Manifest, every: bool = False) -> str:
    """The table of weights; like ones share a row unless `every`."""
    tensors = manifest.weights.tensors
    groups = [(w.name, w, 1, w.bytes) for w in tensors] if every else weight_groups(tensors)
    rows = [
        (name, weight.layout, weight.dtype, "x".join(map(str, weight.shape)) or "scalar", f"x{count}", size(total))
        for name, weight, count, total in groups
    ]
    return f"weights: {len(tensors)} tensors, {size(manifest.weights.bytes)}\n{table(rows, right=(4, 5))}"


def programs_text(manifest: Manifest) -> str:
    """The programs in the order in which they are tried."""
    rows = [
        (program.name, " and ".join(f"{guard} >= 0" for guard in program.guard) or "always", program.symbol)
        for program in manifest.programs
    ]
    return f"programs ({', '.join(manifest.target.levels)})\n{table(rows)}"


def files_text(manifest: Manifest) -> str:
    """The files with their sizes and digests."""
    rows = [(name, size(entry.bytes), entry.xxh3_128) for name, entry in sorted(manifest.files.items())]
    return f"files\n{table(rows, right=(1,))}"
