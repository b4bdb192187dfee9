"""Long contexts: chunks of 512 tokens give the same bits whoever computes them, and with whatever else."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
from attend_case import Case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from levels import ISA_TYPES

from xllm_compiler.artifact.cpu_isa import machine_isas

LENGTHS = (1700, 1100, 520)
EDGES = (0, 1, 63, 64, 510, 511, 512, 513, 575, 576, 1023, 1024, 1025, 1535, 1536)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"window": 600, "sinks": True},
    {"window": 512, "softcap": 4.0},
    {"sinks": True, "softcap": 30.0},
    {"window": 1000, "quantized": True},
]
SHAPES = [(3, 1, 20, 34), (4, 2, 16, 16), (5, 5, 16, 32), (8, 1, 32, 16), (6, 2, 16, 34)]


@pytest.mark.parametrize("isa, dtype", ISA_TYPES)
@pytest.mark.parametrize("shape, options", list(zip(SHAPES, OPTIONS, strict=True)))
def test_contexts_around_the_chunks(
    isa: str, dtype: str, shape: tuple[int, int, int, int], options: dict[str, Any]
) -> None:
    case = Case(LENGTHS, isa, dtype, *shape, divide=True, **options)
    whole = case.run([(request, 0, n) for request, n in enumerate(LENGTHS)])
    for request, n in enumerate(LENGTHS):
        for token in [e for e in EDGES if e < n]:
            for head in range(shape[0]):
                error = np.abs(whole[request][token, head] - case.exact(request, token, head)).max()
                assert error <= case.tolerance, (request, token, head)
            for team in (1, 2, 7):
                (one,) = case.run([(request, token, token + 1)], team)
                assert one.tobytes() == whole[request][token : token + 1].tobytes(), (request, token, team)


class Shared:
    """Kernels take seconds to compile: one of each kind for all examples."""

    cases: ClassVar[dict[tuple[int, bool], Case]] = {}

    @classmethod
    def get(cls, kind: int, divide: bool) -> Case:
        if (kind, divide) not in cls.cases:
            isa, options = machine_isas()[-1], OPTIONS[kind]
            room = (1 << 16, 3000, 1 << 16, 0, 1 << 16)[kind]  # plenty, for one part of an item or two, none
            cls.cases[kind, divide] = Case(LENGTHS, isa, "bf16", *SHAPES[kind], room, divide=divide, **options)
        return cls.cases[kind, divide]


def spans(length: int) -> st.SearchStrategy[tuple[int, int]]:
    ends = st.one_of(st.integers(1, length), st.sampled_from([e for e in EDGES if 0 < e <= length]))
    return st.tuples(ends, st.integers(1, 9)).map(lambda pair: (max(0, pair[0] - pair[1]), pair[0]))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(st.integers(0, 4), st.permutations(range(3)), st.data(), st.integers(1, 5))
def test_any_batch_on_any_team(kind: int, order: list[int], data: st.DataObject, team: int) -> None:
    """Few tokens of some requests in any order, shared out as it comes, and each alone on one thread, undivided."""
    count = data.draw(st.integers(1, 3))
    parts = [(request, *data.draw(spans(LENGTHS[request]))) for request in order[:count]]
    together = Shared.get(kind, True).run(parts, team)
    for part, got in zip(parts, together, strict=True):
        (alone,) = Shared.get(kind, False).run([part])
        assert got.tobytes() == alone.tobytes(), part


def test_parts_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """One request and one KV head on two threads: without what the members left in `parts` the answer is another."""
    case = Shared.get(0, True)
    left: list[np.ndarray] = []
    full = np.full

    def watched(shape: Any, value: Any, dtype: Any = None) -> np.ndarray:
        made = full(shape, value, dtype)
        if dtype is np.float32:
            left.append(made)
        return made

    monkeypatch.setattr(np, "full", watched)
    case.run([(0, 1699, 1700)], 2)
    assert np.isfinite(left[-1]).sum() == 4 * 3 * (1 + 16 + 48)  # chunks, rows, maximum and sums and values
    case.run([(0, 1699, 1700)], 1)
    assert not np.isfinite(left[-1]).any()
