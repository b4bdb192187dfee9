"""Attention against a plain softmax in f64, and bit for bit against itself over chunks, batches, teams."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from attend_case import Case, Part
from levels import BYTE_LEVELS, ISA_TYPES

from xllm_compiler.artifact.cpu_isa import machine_isas

LENGTHS = (147, 70, 5)

CHUNKS: list[list[Part]] = [
    [(0, 0, 40), (1, 69, 70)],
    [(0, 146, 147), (2, 3, 5), (1, 10, 33)],
    [(0, 63, 64)],
    [(0, 64, 65)],
    [(0, 100, 107)],
    [(1, 64, 70), (0, 127, 128)],
]


@pytest.mark.parametrize("isa, dtype", ISA_TYPES)
@pytest.mark.parametrize(
    "q_heads, heads, k_dim, v_dim, options",
    [
        (4, 2, 64, 64, {}),
        (6, 1, 20, 34, {"window": 37, "sinks": True}),
        (7, 1, 32, 64, {"softcap": 5.0}),
        (4, 4, 16, 48, {"window": 64}),
        (4, 2, 64, 64, {"quantized": True}),
        (6, 1, 20, 34, {"quantized": True, "window": 37, "sinks": True}),
        (7, 1, 32, 66, {"quantized": True, "softcap": 5.0}),
    ],
    ids=[
        *("grouped", "window-sinks-tails", "softcap-group-of-7", "window-is-a-block"),
        *("8-bit", "8-bit-window-sinks-tails", "8-bit-softcap"),
    ],
)
def test_attend(
    isa: str, dtype: str, q_heads: int, heads: int, k_dim: int, v_dim: int, options: dict[str, Any]
) -> None:
    case = Case(LENGTHS, isa, dtype, q_heads, heads, k_dim, v_dim, **options)
    everything = [(request, 0, n) for request, n in enumerate(LENGTHS)]
    whole = case.run(everything)
    for request, n in enumerate(LENGTHS):
        for token in [*range(0, n, 9), n - 1]:
            for head in range(0, q_heads, 3):
                error = np.abs(whole[request][token, head] - case.exact(request, token, head)).max()
                assert error <= case.tolerance, (request, token, head)
    for team in (2, 5):
        assert [x.tobytes() for x in case.run(everything, team)] == [x.tobytes() for x in whole]
    for parts in CHUNKS:
        for (request, first, last), out in zip(parts, case.run(parts, 2), strict=True):
            assert out.tobytes() == whole[request][first:last].tobytes(), (parts, request)


def test_eight_bit_pages_give_the_same_bits_at_every_level() -> None:
    found = set()
    for level in BYTE_LEVELS:
        case = Case(LENGTHS, level, "bf16", 4, 2, 64, 64, quantized=True)
        outs = case.run([(0, 0, 147), (1, 64, 70), (2, 3, 5)], 2)
        assert np.isfinite(outs[0].astype(np.float32)).all()
        found.add(tuple(out.tobytes() for out in outs))
    assert len(found) == 1


@pytest.mark.parametrize("quantized", [False, True])
def test_the_size_of_a_block_does_not_show(quantized: bool) -> None:
    found = set()
    for tiles in (1, 2, 7):
        case = Case(LENGTHS, machine_isas()[-1], "bf16", 4, 2, 64, 64, quantized=quantized, tiles=tiles)
        outs = case.run([(0, 0, 147), (1, 64, 70), (2, 3, 5)], 2)
        assert np.abs(outs[0][140, 3] - case.exact(0, 140, 3)).max() <= case.tolerance
        found.add(tuple(out.tobytes() for out in outs))
    assert len(found) == 1
