"""The two laws about order: collectives per group, and interleavings of streams. Owns how they are observed.

Collectives are told apart by what they carry: the combined value of each, in exact arithmetic and in lockstep over all
ranks. So two all-reduces of equal shape that changed places are seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from xllm_compiler.errors import XllmError
from xllm_compiler.interp import run_ranks
from xllm_compiler.interp.streams import run_interleaved_ranks
from xllm_compiler.ir.core import Func, Op, Value
from xllm_compiler.ir.diag import render
from xllm_compiler.ir.ops import Collective
from xllm_compiler.ir.semantics import Array
from xllm_compiler.testing.inputs import Given, make
from xllm_compiler.testing.laws_trial import Trial

ORDERS = 3  # random interleavings of one function at one size
OTHER_VALUE = "carries what none carried before"
CLOSE = 1e-5  # relative: payloads are told apart, not judged; constants may have been rounded


@dataclass(frozen=True)
class Payload:
    """One collective as it was run: `value` is what rank 0 got."""

    op: Op
    group: str
    kind: str
    value: Array

    def __str__(self) -> str:
        return f"{self.kind} of {list(self.value.shape)} numbers"

    def same_as(self, other: Payload) -> bool:
        """Whether both carry the same numbers, up to the order of summing."""
        if self.kind != other.kind or self.value.shape != other.value.shape:
            return False
        a, b = self.value.astype(np.float64), other.value.astype(np.float64)
        scale = float(np.abs(a).max(where=np.isfinite(a), initial=0.0))
        return bool(np.allclose(a, b, rtol=0.0, atol=CLOSE * (scale or 1.0), equal_nan=True))


def check_collectives(t: Trial) -> str | None:
    """What is wrong with the order of collectives after a pass, or None."""
    for name, func in t.before.funcs.items():
        changed = t.after.funcs.get(name)
        if changed is None or not (_starts(func) or _starts(changed)):
            continue
        given = _given(func)
        before, after = payloads(func, given), payloads(changed, given)
        for group in dict.fromkeys([*before, *after]):
            found = _compare(group, before.get(group, []), after.get(group, []))
            if found is not None:
                return f"@{name}: {found}"
    return None


def payloads(func: Func, given: Given) -> dict[str, list[Payload]]:
    """The collectives of every group in the order in which they are issued."""
    out: dict[str, list[Payload]] = {}

    def watch(v: Value, rank: int, x: Array) -> Array:
        if rank == 0 and isinstance(v.op, Collective):
            choices = [str(v.op.attrs[a.name]) for a in v.op.SPEC.attrs if a.kind not in ("group", "dim")]
            kind = " ".join([v.op.name.removeprefix("comm.").removesuffix("_start"), *choices])
            out.setdefault(v.op.group, []).append(Payload(v.op, v.op.group, kind, x))
        return x

    run_ranks(func.module, func.name, _inputs(func, given), given.params, given.dims, True, watch)
    return out


def _compare(group: str, before: Sequence[Payload], after: Sequence[Payload]) -> str | None:
    if len(before) != len(after):
        at = f"\n  at {render(after[0].op, 3)}" if after else ""
        return f"group @{group} had {len(before)} collectives and has {len(after)}{at}"
    for i, (b, a) in enumerate(zip(before, after, strict=True)):
        if b.same_as(a):
            continue
        where = f"\n  at {render(a.op, 3)}"
        place = next((j for j, other in enumerate(before) if other.same_as(a)), None)
        if place is None:
            return f"collective {i + 1} of group @{group}, a {a}, {OTHER_VALUE}{where}"
        return f"group @{group}: the collective that was number {place + 1} is number {i + 1} now ({a}){where}"
    return None


def check_interleavings(t: Trial) -> str | None:
    """Runs what a pass left in random legal orders; the error of the first that fails, or None."""
    for func in t.after.funcs.values():
        given = _given(func)
        inputs = _inputs(func, given)
        want = run_ranks(t.after, func.name, inputs, given.params, given.dims)
        for seed in range(ORDERS):
            try:
                got = run_interleaved_ranks(t.after, func.name, inputs, given.params, given.dims, seed=seed)
            except XllmError as e:
                return f"order {seed} of the streams fails\n{e}"
            for rank, (x, y) in enumerate(zip(want, got, strict=True)):
                for i, (a, b) in enumerate(zip(x, y, strict=True)):
                    if not bits_equal(a, b):
                        v = func.returns[i]
                        at = "" if v.op is None else f"\n  at {render(v.op, 3)}"
                        return f"order {seed} of the streams gives another return {i}, %{v.name}, on rank {rank}{at}"
    return None


def bits_equal(a: Array, b: Array) -> bool:
    """Whether two arrays hold the same bits; one NaN is as good as another."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.dtype.kind in "iub":
        return bool(np.array_equal(a, b))
    x, y = a.astype(np.float64), b.astype(np.float64)
    return bool(np.array_equal(x, y, equal_nan=True) and np.all((np.signbit(x) == np.signbit(y)) | np.isnan(x)))


def _starts(func: Func) -> bool:
    return any(isinstance(op, Collective) for op in func.ops)


def _given(func: Func) -> Given:
    """A ragged step of a few requests, where the function has such a thing."""
    return make(func, {})


def _inputs(func: Func, given: Given) -> list[Mapping[str, Array]]:
    names = {a.name for a in func.args}
    return [{k: v for k, v in rank.items() if k in names} for rank in given.inputs]
