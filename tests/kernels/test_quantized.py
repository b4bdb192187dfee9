"""Quantized linear layers: exact against integers in numpy, and bit for bit over rows, tiles and teams."""

from __future__ import annotations

import functools
from operator import attrgetter

import ml_dtypes
import numpy as np
import pytest
from levels import BYTE_LEVELS, LEVELS, TIERED_BYTE_LEVELS

from tests.kernels.grid_bytes import bytes_on_grids
from xllm_compiler.artifact.cpu_isa import machine_isas
from xllm_compiler.kernels.layouts import interleave_glu, pack_quantized
from xllm_compiler.kernels.tir.isa.levels import ISAS, Isa
from xllm_compiler.kernels.tir.linear.linear import Linear, LinearGlu
from xllm_compiler.kernels.tir.native.standalone import Standalone, aligned
from xllm_compiler.kernels.tir.rows.quantize import QuantizeRows
from xllm_compiler.weight_formats import GridFormat, IntegerFormat, WeightFormat, parse_format

BF16 = np.dtype(ml_dtypes.bfloat16)
NAME = attrgetter("name")
FORMS = ["q8", "q4g32", "q4g64", "q4g32z", "q8g32", "q4grid16", "q4grid32"]


def quantized(
    rng: np.random.Generator, form: WeightFormat, n: int, k: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Stored values, scales, zeros of a random weight."""
    groups = form.groups(k)
    values = rng.integers(0, 1 << form.bits, (n, k)).astype(np.uint8)
    if isinstance(form, GridFormat):
        values = bytes_on_grids(rng, n, k, form.grid)
    scales = rng.uniform(0.01, 0.1, (n, groups)).astype(np.float16 if form.group else np.float32)
    zeros = (
        rng.integers(0, 1 << form.bits, (n, groups)).astype(np.uint8) if form.zeros else np.full((n, groups), form.zero)
    )
    return values, scales, zeros.astype(np.uint8)


def rows_reference(x: np.ndarray, form: WeightFormat) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """8-bit weights in groups want a scale for each group of a row."""
    rows, k = x.shape
    wide = np.zeros((rows, form.padded(k)), np.float32)
    wide[:, :k] = x
    parts = wide.reshape(rows, form.groups(k) if form.rows.by_group else 1, -1)
    top = np.abs(parts).max(axis=2, keepdims=True)
    scale = top * np.float32(1 / 127)
    factor = np.divide(np.float32(127), top, out=np.zeros_like(top), where=top > 0)
    q = np.rint(parts * factor).astype(np.int8).reshape(wide.shape)
    sums = q.reshape(rows, form.groups(k), -1).astype(np.int32).sum(axis=2, dtype=np.int32)
    return q, scale[:, :, 0] if form.rows.by_group else scale[:, 0, 0], sums


def unrounded(x: np.ndarray, scale: np.ndarray, k: int) -> np.ndarray:
    """What rows stand for, f64 [rows, k]."""
    each = scale.reshape(len(x), -1, 1).astype(np.float64)
    return np.asarray((x.reshape(*each.shape[:2], -1) * each).reshape(x.shape)[:, :k])


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("form", ["q8", "q4g32", "q4g64", "q8g32"])
@pytest.mark.parametrize("k", [1, 16, 37, 64, 200])
def test_rows_are_quantized_as_numpy_would(isa: str, form: str, k: int) -> None:
    rng = np.random.default_rng(k)
    parsed = parse_format(form)
    x = (rng.standard_normal((7, k)) * 3).astype(BF16)
    x[3] = 0
    x[4, 32:] = 0  # of groups, some are all zeros
    kernel = Standalone(QuantizeRows(k, "bf16", parsed.group, by_group=parsed.rows.by_group), ISAS[isa])
    q = np.full((8, parsed.padded(k)), 99, np.int8)
    scale = np.full((8, parsed.groups(k)) if parsed.rows.by_group else 8, 9, np.float32)
    sums = np.full((8, parsed.groups(k)), 9, np.int32)
    for team in (1, 3):
        kernel(x, q, scale, sums, 7, team=team)
        want = rows_reference(x, parsed)
        assert (q[:7] == want[0]).all() and (scale[:7] == want[1]).all() and (sums[:7] == want[2]).all()
        assert (q[7] == 99).all() and (scale[7] == 9).all() and (sums[7] == 9).all()


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize("k, block", [(16, 16), (48, 16), (64, 64), (192, 64)])
def test_rotated_rows(dtype: str, k: int, block: int) -> None:
    """Against Sylvester's matrix in f64; the same bits at all levels and for all teams; infinity makes the row NaN."""
    matrix = functools.reduce(np.kron, [np.array([[1.0, 1.0], [1.0, -1.0]])] * int(np.log2(block))) / np.sqrt(block)
    rng = np.random.default_rng(k)
    wide = rng.standard_normal((7, k)) * np.exp(2 * rng.standard_normal((7, k)))
    x = wide.astype(BF16 if dtype == "bf16" else np.float32)
    x[3], x[5, k - 1] = 0, np.inf
    with np.errstate(invalid="ignore"):
        turned = (x.astype(np.float64).reshape(-1, block) @ matrix).reshape(7, k)
    top = np.abs(turned).max(axis=1)
    found = set()
    for isa in machine_isas():
        kernel = Standalone(QuantizeRows(k, dtype, rotate=block), ISAS[isa])
        for team in (1, 3):
            q, scale, sums = np.full((8, k), 99, np.int8), np.full(8, 9, np.float32), np.full((8, 1), 9, np.int32)
            kernel(x, q, scale, sums, 7, team=team)
            found.add((q.tobytes(), scale.tobytes(), sums.tobytes()))
    assert len(found) == 1
    rows = [0, 1, 2, 4, 6]
    np.testing.assert_allclose(scale[rows], top[rows] / 127, rtol=1e-6)
    assert np.abs(q[rows] - turned[rows] * (127 / top[rows, None])).max() <= 0.5 + 1e-3
    assert scale[3] == 0 and not q[3].any() and np.isnan(scale[5])
    assert (sums[:7, 0] == q[:7].sum(axis=1, dtype=np.int32)).all() and (q[7] == 99).all() and scale[7] == 9


@pytest.mark.parametrize("isa", LEVELS)
def test_a_row_that_is_not_finite_says_so(isa: str) -> None:
    x = np.ones((3, 40), np.float32)
    x[0, 39], x[2, 0] = np.nan, np.inf
    kernel = Standalone(QuantizeRows(40, "f32"), ISAS[isa])
    scale = np.zeros(3, np.float32)
    kernel(x, np.zeros((3, 48), np.int8), scale, np.zeros((3, 1), np.int32), 3)
    assert np.isnan(scale[[0, 2]]).all() and scale[1] == np.float32(1 / 127)
    by_group = Standalone(QuantizeRows(40, "f32", 16, by_group=True), ISAS[isa])
    scale = np.zeros((3, 3), np.float32)
    by_group(x, np.zeros((3, 48), np.int8), scale, np.zeros((3, 3), np.int32), 3)
    assert (np.isnan(scale) == [[False, False, True], [False] * 3, [True, False, False]]).all()
    assert (scale[~np.isnan(scale)] == np.float32(1 / 127)).all()


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("k, n", [(64, 192), (37, 100), (130, 16), (1, 1), (600, 70)])
def test_linear(isa: str, form: str, k: int, n: int) -> None:
    rng = np.random.default_rng(n)
    q, level = parse_format(form), ISAS[isa]
    values, scales, zeros = quantized(rng, q, n, k)
    kernel = Standalone(Linear(k, n, "bf16", "f32", bias=True, residual=True, weights=form), level)
    packed = aligned(q.shape(n, k), np.uint8)
    packed[:] = pack_quantized(q, values, scales, zeros)
    most = 70 if level.has_amx or level.slice_bytes or isinstance(q, GridFormat) else 15  # blocks of up to 48 rows
    x, xs, xsum = rows_reference(rng.standard_normal((most, k)).astype(BF16), q)
    bias, residual = rng.standard_normal(n).astype(BF16), rng.standard_normal((most, n)).astype(BF16)

    def run(rows: int, team: int) -> np.ndarray:
        y = np.full((rows + 1, n), 7, np.float32)
        kernel(x, xs, xsum, packed, bias, residual, y, rows, team=team)
        assert (y[rows] == 7).all()
        return y[:rows]

    group = q.group or q.padded(k)
    stored = np.repeat(zeros, group, axis=1)[:, :k].astype(np.int64)
    weight = (values.astype(np.int64) - stored) * np.repeat(scales.astype(np.float64), group, axis=1)[:, :k]
    expected = unrounded(x, xs, k) @ weight.T
    expected = expected + bias.astype(np.float64) + residual.astype(np.float64)
    whole = run(most, 1)
    assert np.abs(whole - expected).max() <= 2e-6 * np.abs(expected).max()
    for rows in [*range(15), *range(15, most, 9)]:
        for team in (1, 2, 3):
            assert run(rows, team).tobytes() == whole[:rows].tobytes(), (rows, team)


@pytest.mark.parametrize("level", TIERED_BYTE_LEVELS, ids=NAME)
@pytest.mark.parametrize("form", ["q8", "q4g32", "q8g32", "q4grid16"])
def test_linear_glu(level: Isa, form: str) -> None:
    k, f = 96, 40
    rng = np.random.default_rng(1)
    q = parse_format(form)
    values, scales, zeros = quantized(rng, q, 2 * f, k)
    packed = pack_quantized(q, interleave_glu(values, q.zero), interleave_glu(scales), interleave_glu(zeros))
    kernel = Standalone(LinearGlu(k, f, "bf16", weights=form), level)
    x, xs, xsum = rows_reference(rng.standard_normal((9, k)).astype(BF16), q)
    y = np.zeros((9, f), BF16)
    kernel(x, xs, xsum, packed, y, 9, team=2)
    group = q.group or q.padded(k)
    weight = (values.astype(np.float64) - q.zero) * np.repeat(scales.astype(np.float64), group, axis=1)[:, :k]
    both = unrounded(x, xs, k) @ weight.T
    gate, up = both[:, :f], both[:, f:]
    expected = gate / (1 + np.exp(-gate)) * up
    assert np.abs(y.astype(np.float64) - expected).max() <= 5e-3 * np.abs(expected).max()


@pytest.mark.parametrize("form", ["q4grid16", "q4grid32"])
def test_weights_on_grids_are_those_of_8_bits(form: str) -> None:
    """Bit for bit, at every level, whatever they are stored as: sums of integers are exact."""
    k, n, most, rng = 1100, 130, 70, np.random.default_rng(1)
    q, plain = parse_format(form), IntegerFormat(8)
    values, scales, _ = quantized(rng, q, n, k)
    x, xs, xsum = rows_reference(rng.standard_normal((most, k)).astype(BF16), plain)
    bias, found = rng.standard_normal(n).astype(BF16), set()
    for level in BYTE_LEVELS:
        for one in (q, plain):
            kernel = Standalone(Linear(k, n, "bf16", "f32", bias=True, weights=str(one)), level)
            packed = pack_quantized(one, values, scales)
            for rows in (1, 8, 9, most):
                y = np.zeros((rows, n), np.float32)
                kernel(x, xs, xsum, packed, bias, y, rows, team=2)
                found.add((rows, y.tobytes()))
    assert len(found) == 4


@pytest.mark.parametrize("isa", LEVELS)
def test_grids_of_more_than_fit_as_bytes(isa: str) -> None:
    """A panel of bytes that no stack should hold stays slices, whatever the number of rows."""
    k, n, most, rng = 16500, 64, 60, np.random.default_rng(2)
    q, plain = parse_format("q4grid32"), IntegerFormat(8)
    values, scales, _ = quantized(rng, q, n, k)
    x, xs, xsum = rows_reference(rng.standard_normal((most, k)).astype(BF16), plain)
    found = []
    for one in (q, plain):
        kernel = Standalone(Linear(k, n, "bf16", "f32", weights=str(one)), ISAS[isa])
        y = np.zeros((most, n), np.float32)
        kernel(x, xs, xsum, pack_quantized(one, values, scales), y, most, team=2)
        found.append(y.tobytes())
    assert found[0] == found[1]
