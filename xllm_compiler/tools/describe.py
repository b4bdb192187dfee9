"""Parts of a manifest as text, for the compile report and for `xllm-compile show`. Reads manifests only."""

from __future__ import annotations

import re
from collections.abc import Iterable

from xllm_compiler.artifact import Manifest, Weight
from xllm_compiler.artifact.schema import PAGES
from xllm_compiler.step.interface import Function, Pooling, TensorSpec
from xllm_compiler.tools.console import size, table

GIB = 1 << 30


def pooling_text(pooling: Pooling) -> str:
    """How embeddings are made, in words."""
    of = {"last": "the last token", "mean": "the mean of all tokens", "cls": "the first token"}[pooling.kind]
    cut = ""
    if pooling.dimensions is not None:
        cut = f", may be cut to {', '.join(map(str, pooling.dimensions)) or 'any size'}"
    return f"{of}, {'normalized' if pooling.normalize else 'as it is'}{cut}"


def memory_text(manifest: Manifest) -> str:
    """The memory formulas, their values at the limits, and what a KV budget comes to."""
    limits = manifest.limit_values(1)
    arena, outputs = manifest.arena_bytes(limits), manifest.output_bytes(limits)
    fixed = manifest.weights.bytes + arena + outputs
    page_bytes, page_tokens = manifest.page_bytes, manifest.page_tokens
    at = ", ".join(f"{name}={limits[name]}" for name in sorted(limits) if name != PAGES)
    formulas = [program.arena for function in manifest.functions.values() for program in function.programs]
    rows = [
        ("weights", size(manifest.weights.bytes), "mapped from weights.bin"),
        ("arena", size(arena), ("the largest of " if len(formulas) > 1 else "") + "; ".join(formulas)),
        ("outputs", size(outputs), ", ".join(f"{name} {spec}" for name, spec in _outputs(manifest))),
        (
            "kv",
            f"{size(page_bytes)} a page",
            f"{page_bytes}*P, {page_tokens} tokens a page, {len(manifest.states)} layers",
        ),
    ]
    text = f"memory at {at}\n{table(rows, right=(1,))}"
    if not page_bytes:
        return text
    total = GIB
    while total < 2 * fixed + page_bytes:
        total *= 2
    pages = (total - fixed) // page_bytes
    tokens = pages * page_tokens
    longest = -(-manifest.model.max_model_len // page_tokens)
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


def _outputs(manifest: Manifest) -> list[tuple[str, TensorSpec]]:
    """Every output of every function, named `function.output`."""
    functions = manifest.functions.items()
    return [(f"{name}.{spec.name}", spec) for name, function in functions for spec in function.outputs]


def functions_text(manifest: Manifest) -> str:
    """What each function takes and gives, and its programs in the order in which they are tried."""
    parts = []
    for name, function in manifest.functions.items():
        rows = [(kind, spec.name, str(spec)) for kind, specs in _specs(function) for spec in specs]
        if function.states:
            rows.append(("state", ", ".join(function.states), ""))
        for program in function.programs:
            guards = " and ".join(f"{guard} >= 0" for guard in program.guard) or "always"
            rows.append(("program", program.symbol, guards))
        parts.append(f"@{name} ({', '.join(manifest.target.levels)})\n{table(rows)}")
    return "\n\n".join(parts)


def _specs(function: Function) -> list[tuple[str, tuple[TensorSpec, ...]]]:
    return [("in", function.inputs), ("out", function.outputs)]


def states_text(manifest: Manifest) -> str:
    """The states, those that are alike in one row."""
    groups: dict[str, list[str]] = {}
    for name, state in manifest.states.items():
        sizes = ", ".join(f"{key}={value}" for key, value in sorted(state.sizes.items()))
        text = f"{state.kind} {state.dtype} {state.layout}, {sizes}; {state.blocks} x {size(state.block_bytes)}"
        groups.setdefault(text, []).append(name)
    rows = [
        (names[0] if len(names) == 1 else f"{len(names)}, such as {names[0]}", text) for text, names in groups.items()
    ]
    return f"states\n{table(rows)}"


def files_text(manifest: Manifest) -> str:
    """The files with their sizes and digests."""
    rows = [(name, size(entry.bytes), entry.xxh3_128) for name, entry in sorted(manifest.files.items())]
    return f"files\n{table(rows, right=(1,))}"
