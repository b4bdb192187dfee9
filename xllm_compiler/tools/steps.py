"""Steps for checking an artifact: random requests, prefilled whole and in chunks, then decoded. Owns the schedule and
the page tables; must not know who runs the steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xllm_compiler.artifact import Manifest
from xllm_compiler.step.inputs import UNMAPPED, StepBatch, StepWriter
from xllm_compiler.step.interface import STEP

Array = NDArray[Any]
I32 = NDArray[np.int32]
Plan = list[tuple[int, int]]
_LENGTHS = (1, 5, 16, 17, 40, 3)  # tokens of a prompt: less than a page, whole pages, just over, several


@dataclass(frozen=True)
class Step:
    """The inputs of one step and its sizes. `rows[i]`: (request, position) of row i of the logits."""

    inputs: dict[str, Array]
    sizes: dict[str, int]
    rows: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Trial:
    """Requests and the steps of `function` that serve them from a pool of `pages` KV pages."""

    function: str
    tokens: tuple[I32, ...]
    steps: tuple[Step, ...]
    pages: int


def make_trial(manifest: Manifest, seed: int, function: str = STEP, decode_steps: int = 3) -> Trial:
    """Random requests within the artifact's limits. Each step computes some tokens of some requests: first one chunk of
    each prompt, then the rest beside the first decodes, then decodes alone. Pages are dealt out in random order."""
    draw = np.random.default_rng(seed)
    limits, longest = manifest.limits, manifest.model.max_model_len
    lengths = [min(length, max(1, longest - decode_steps)) for length in _LENGTHS][: limits.max_num_seqs]
    goals = [min(length + decode_steps, longest) for length in lengths]
    tokens = [draw.integers(0, manifest.model.vocab_size, goal).astype(np.int32) for goal in goals]
    page = manifest.page_tokens
    counts = [-(-goal // page) for goal in goals]
    pages = sum(counts) + 3
    order = draw.permutation(pages)[: sum(counts)].astype(np.int32)
    tables = np.full((len(goals), -(-longest // page)), UNMAPPED, np.int32)
    for i, count in enumerate(counts):
        tables[i, :count] = order[sum(counts[:i]) : sum(counts[: i + 1])]
    done = [0] * len(goals)
    steps: list[Step] = []
    while any(a < b for a, b in zip(done, goals, strict=True)):
        plan = _plan(done, lengths, goals, limits.max_num_batched_tokens, first=not steps)
        steps.append(_step(plan, done, tokens, tables, manifest, function))
        for request, count in plan:
            done[request] += count
    return Trial(function, tuple(tokens), tuple(steps), pages)


def _plan(done: list[int], prompts: list[int], goals: list[int], budget: int, first: bool) -> Plan:
    """(request, tokens) of the next step: a decode, or the rest of a prompt; long prompts only begin in the first."""
    plan = []
    for request, (at, prompt, goal) in enumerate(zip(done, prompts, goals, strict=True)):
        if at >= goal or budget == 0:
            continue
        rest = 1 if at >= prompt else prompt - at
        count = min(budget, 1 + rest // 3 if first and rest > 16 else rest)
        plan.append((request, count))
        budget -= count
    return plan


def _step(plan: Plan, done: list[int], tokens: list[I32], tables: I32, manifest: Manifest, function: str) -> Step:
    most = manifest.limits.max_num_logits
    count = sum(count for _, count in plan)
    capacity = {"N": count, "B": len(plan), "S": most}
    writer = StepWriter(StepBatch(function, manifest.functions[function], capacity))
    rows: list[tuple[int, int]] = []
    for request, count in plan:
        at = done[request]
        wanted = [count - 1 - back for back in sorted({0, count // 2})][: most - len(rows)]
        writer.add(tokens[request][at : at + count], at, tables[request], wanted)
        rows += [(request, at + row) for row in wanted]
    batch = writer.end()
    return Step(batch.inputs(), batch.sizes, tuple(rows))
