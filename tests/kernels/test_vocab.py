"""The vocabulary projection with its block maxima against `Linear` and numpy; NaN, infinities, short last blocks."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from levels import LEVELS

from xllm_compiler.artifact.cpu_isa import machine_isas
from xllm_compiler.kernels import layouts
from xllm_compiler.kernels.tir.isa.levels import ISAS
from xllm_compiler.kernels.tir.linear.linear import Linear
from xllm_compiler.kernels.tir.linear.vocab import BlockMax, LinearBlockMax
from xllm_compiler.kernels.tir.native.standalone import Standalone
from xllm_compiler.weight_formats import parse_format

NUMPY = {"bf16": np.dtype(ml_dtypes.bfloat16), "f32": np.dtype(np.float32)}
ROWS = 9


def largest(y: np.ndarray) -> np.ndarray:
    """By blocks of 64 columns; numpy's max is NaN where a value is."""
    return np.stack([y[:, at : at + 64].max(axis=1) for at in range(0, y.shape[1], 64)], axis=1)


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("n", [1, 63, 64, 65, 200, 256, 340])
def test_block_max(isa: str, n: int) -> None:
    rng = np.random.default_rng(n)
    x = rng.standard_normal((ROWS, n)).astype(np.float32)
    x[1] = -np.inf
    x[2, n // 2] = np.inf
    x[3, n - 1] = np.nan
    x[4, 0] = np.nan
    x[5] = 1.0
    x[6, : n // 2] = -np.inf
    kernel = Standalone(BlockMax(n), ISAS[isa])
    for team in (1, 2, 3):
        block = np.full((ROWS + 1, -(-n // 64)), 7, np.float32)
        kernel(x, block, ROWS, team=team)
        np.testing.assert_array_equal(block[:ROWS], largest(x))
        assert (block[ROWS] == 7).all()


@pytest.mark.parametrize("place", range(64))
def test_every_column_of_a_block_counts(place: int) -> None:
    kernel = _best_block_max()
    for value in (np.float32(5), np.float32(np.nan)):
        x = np.full((1, 100), -3, np.float32)
        x[0, place] = value
        block = np.zeros((1, 2), np.float32)
        kernel(x, block, 1)
        np.testing.assert_array_equal(block, [[value, -3]])


_made: list[Standalone] = []


def _best_block_max() -> Standalone:
    if not _made:
        _made.append(Standalone(BlockMax(100), ISAS[machine_isas()[-1]]))
    return _made[0]


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize(
    "dtype, weights", [("bf16", ""), ("f32", ""), ("bf16", "q8"), ("bf16", "q4g32"), ("bf16", "q4grid32")]
)
@pytest.mark.parametrize("n, bias", [(200, True), (128, False)])
def test_projection(isa: str, dtype: str, weights: str, n: int, bias: bool) -> None:
    """The same logits as without maxima, bit for bit, and the maxima of those."""
    k, rng = 64, np.random.default_rng(n)
    if weights:
        form = parse_format(weights)
        panels = -(-n // 64)
        w = np.zeros((panels, form.panel_bytes(k)), np.uint8)
        for group in range(form.groups(k)):
            at = group * form.group_bytes(k)
            scales = rng.uniform(0.01, 0.1, (panels, 64)).astype(np.float32 if form.scale_bytes == 4 else np.float16)
            w[:, at : at + 64 * form.scale_bytes] = scales.view(np.uint8)
            w[:, at + form.header_bytes : at + form.group_bytes(k)] = rng.integers(
                0, 256, (panels, form.group_bytes(k) - form.header_bytes)
            )
        x = rng.integers(-127, 128, (ROWS, k)).astype(np.int8)
        sums = x.reshape(ROWS, form.groups(k), -1).sum(axis=2, dtype=np.int32)
        given = [x, rng.uniform(0.01, 0.1, ROWS).astype(np.float32), np.ascontiguousarray(sums), w]
    else:
        w = rng.standard_normal((n, k)).astype(NUMPY[dtype])
        given = [rng.standard_normal((ROWS, k)).astype(NUMPY[dtype]), layouts.pack_panels(w)]
    if bias:
        given.append(rng.standard_normal(n).astype(NUMPY[dtype]))
    plain = Standalone(Linear(k, n, dtype, "f32", bias, weights=weights), ISAS[isa])
    fused = Standalone(LinearBlockMax(k, n, dtype, bias, weights), ISAS[isa])
    want = np.zeros((ROWS, n), np.float32)
    plain(*given, want, ROWS)
    for rows in (0, 1, 5, ROWS):
        for team in (1, 2):
            y, block = np.full((ROWS, n), 7, np.float32), np.full((ROWS, -(-n // 64)), 7, np.float32)
            fused(*given, y, block, rows, team=team)
            assert y[:rows].tobytes() == want[:rows].tobytes() and (y[rows:] == 7).all()
            np.testing.assert_array_equal(block[:rows], largest(want[:rows]) if rows else block[:0])
            assert (block[rows:] == 7).all()
