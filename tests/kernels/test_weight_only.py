"""Linear layers of float activations by quantized weights: against numpy in double precision, and bit for bit."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from levels import LEVELS

from tests.kernels.grid_bytes import bytes_on_grids
from xllm_compiler.kernels.layouts import interleave_glu, pack_quantized
from xllm_compiler.kernels.tir.isa.levels import ISAS
from xllm_compiler.kernels.tir.linear.linear import Linear, LinearGlu
from xllm_compiler.kernels.tir.native.standalone import Standalone
from xllm_compiler.weight_formats import GridFormat, WeightFormat, parse_format

NUMPY = {"bf16": np.dtype(ml_dtypes.bfloat16), "f32": np.dtype(np.float32)}
FORMS = [
    *(("q8", "bf16"), ("q4g32z", "bf16"), ("q4g64", "f32"), ("q8g32z", "f32")),
    *(("q4grid16", "bf16"), ("q4grid32", "bf16"), ("q4grid32", "f32")),
]
Parts = tuple[np.ndarray, np.ndarray, np.ndarray | None]


def random_weight(rng: np.random.Generator, q: WeightFormat, n: int, k: int) -> Parts:
    values = rng.integers(0, 1 << q.bits, (n, k)).astype(np.uint8)
    if isinstance(q, GridFormat):
        values = bytes_on_grids(rng, n, k, q.grid)
    scales = rng.uniform(0.01, 0.1, (n, q.groups(k))).astype(np.float16 if q.group else np.float32)
    zeros = rng.integers(0, 1 << q.bits, scales.shape).astype(np.uint8) if q.zeros else None
    return values, scales, zeros


def meaning(q: WeightFormat, values: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None) -> np.ndarray:
    """What the parts of a weight stand for, element by element."""
    n, k = values.shape
    out = np.empty((n, k))
    for i in range(k):
        group = i // q.group if q.group else 0
        zero = q.zero if zeros is None else zeros[:, group].astype(np.float64)
        out[:, i] = (values[:, i].astype(np.float64) - zero) * scales[:, group].astype(np.float64)
    return out


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("form, dtype", FORMS)
@pytest.mark.parametrize("k, n", [(64, 192), (37, 100), (1, 1)])
def test_linear(isa: str, form: str, dtype: str, k: int, n: int) -> None:
    rng = np.random.default_rng(n)
    q, most = parse_format(form), 43  # from 32 rows on a panel is taken apart once for all of them
    parts = random_weight(rng, q, n, k)
    packed = pack_quantized(q, *parts)
    kernel = Standalone(Linear(k, n, dtype, "f32", bias=True, residual=True, weights=f"w{form}"), ISAS[isa])
    x, bias = rng.standard_normal((most, k)).astype(NUMPY[dtype]), rng.standard_normal(n).astype(NUMPY[dtype])
    residual = rng.standard_normal((most, n)).astype(NUMPY[dtype])

    def run(rows: int, team: int) -> np.ndarray:
        y = np.full((rows + 1, n), 7, np.float32)
        kernel(x, packed, bias, residual, y, rows, team=team)
        assert (y[rows] == 7).all()
        return y[:rows]

    whole = run(most, 1)
    expected = x.astype(np.float64) @ meaning(q, *parts).T + bias.astype(np.float64) + residual.astype(np.float64)
    assert np.abs(whole - expected).max() <= 2e-6 * np.abs(expected).max()
    for rows in (*range(12), 31, 32, 42):
        for team in (1, 2, 3):
            assert run(rows, team).tobytes() == whole[:rows].tobytes(), (rows, team)


@pytest.mark.parametrize("isa", LEVELS)
def test_more_rows_than_are_taken_at_a_time(isa: str) -> None:
    """Where nothing multiplies bf16 there is room for 52 widened rows of these, and with k of 20,000 for too few."""
    for k in (5000, 20000):
        rng, q, n, most = np.random.default_rng(k), parse_format("q4g128"), 70, 110
        packed = pack_quantized(q, *random_weight(rng, q, n, k))
        kernel = Standalone(Linear(k, n, "bf16", "f32", weights="wq4g128"), ISAS[isa])
        x, alone = rng.standard_normal((most, k)).astype(NUMPY["bf16"]), np.zeros((most, n), np.float32)
        for row in range(most):
            kernel(x[row : row + 1], packed, alone[row : row + 1], 1)
        for team in (1, 2):
            together = np.full((most, n), 7, np.float32)
            kernel(x, packed, together, most, team=team)
            assert together.tobytes() == alone.tobytes(), (k, team)


@pytest.mark.parametrize("isa", LEVELS)
def test_linear_glu(isa: str) -> None:
    k, f, rng, q = 96, 40, np.random.default_rng(1), parse_format("q4g32")
    values, scales, zeros = random_weight(rng, q, 2 * f, k)
    kernel = Standalone(LinearGlu(k, f, "bf16", weights="wq4g32"), ISAS[isa])
    x, y = rng.standard_normal((9, k)).astype(NUMPY["bf16"]), np.zeros((9, f), NUMPY["bf16"])
    kernel(x, pack_quantized(q, interleave_glu(values), interleave_glu(scales)), y, 9, team=2)
    both = x.astype(np.float64) @ meaning(q, values, scales, zeros).T
    expected = both[:, :f] / (1 + np.exp(-both[:, :f])) * both[:, f:]
    assert np.abs(y.astype(np.float64) - expected).max() <= 5e-3 * np.abs(expected).max()
