"""Linear kernels against numpy in double precision, and bit for bit against themselves over rows, tiles and teams."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from levels import ISA_TYPES, LEVELS

from xllm_compiler.errors import XllmError
from xllm_compiler.kernels import layouts
from xllm_compiler.kernels.tir.isa.levels import ISAS
from xllm_compiler.kernels.tir.linear.linear import Linear, LinearGlu
from xllm_compiler.kernels.tir.native.standalone import Standalone
from xllm_compiler.weight_formats import Layout, glu_rows, panel_shape

NUMPY = {"bf16": np.dtype(ml_dtypes.bfloat16), "f32": np.dtype(np.float32)}
TOLERANCE = {"bf16": 5e-3, "f32": 2e-6}

ACTIVATIONS = {
    "none": lambda x: x,
    "silu": lambda x: x / (1 + np.exp(-x)),
    "relu": lambda x: np.maximum(x, 0),
    "gelu_tanh": lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
}


def normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, scale: float = 1.0) -> np.ndarray:
    return (rng.standard_normal(shape) * scale).astype(NUMPY[dtype])


@pytest.mark.parametrize("isa, dtype", ISA_TYPES)
@pytest.mark.parametrize(
    "k, n, bias, residual, act",
    [
        (64, 192, False, True, "gelu_tanh"),
        (37, 100, True, False, "silu"),
        (1, 1, True, True, "none"),
        (130, 16, True, True, "relu"),
    ],
)
def test_linear(isa: str, dtype: str, k: int, n: int, bias: bool, residual: bool, act: str) -> None:
    rng = np.random.default_rng(k)
    level = ISAS[isa]
    kernel = Standalone(Linear(k, n, dtype, dtype, bias, residual, act), level)
    w, b = normal(rng, (n, k), dtype, 0.3), normal(rng, (n,), dtype)
    packed = layouts.pack_panels(w)
    in_blocks = level.has_amx or (dtype == "bf16" and not level.has_bf16_dot)
    most = 70 if in_blocks else 15  # blocks of up to 48 rows
    x, res = normal(rng, (most, k), dtype), normal(rng, (most, n), dtype)

    def run(rows: int, team: int) -> np.ndarray:
        y = np.full((rows + 1, n), 7, NUMPY[dtype])  # one row more, which must stay as it is
        extra = ([b] if bias else []) + ([res] if residual else [])
        kernel(x, packed, *extra, y, rows, team=team)
        assert (y[rows] == 7).all()
        return y[:rows]

    whole = run(most, 1)
    expected = x.astype(np.float64) @ w.astype(np.float64).T + (b.astype(np.float64) if bias else 0)
    expected = ACTIVATIONS[act](expected) + (res.astype(np.float64) if residual else 0)
    assert np.abs(whole.astype(np.float64) - expected).max() <= TOLERANCE[dtype] * np.abs(expected).max()
    for rows in [*range(15), *range(15, most, 9)]:
        for team in (1, 2, 3):
            assert run(rows, team).tobytes() == whole[:rows].tobytes(), (rows, team)


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("k", [5000, 8200, 20000])  # rows are widened for all panels, for a few rows only, not at all
def test_more_rows_than_are_taken_at_a_time(isa: str, k: int) -> None:
    n, most = 70, 110
    rng = np.random.default_rng(5)
    kernel = Standalone(Linear(k, n, "bf16", "f32"), ISAS[isa])
    w, x = normal(rng, (n, k), "bf16"), normal(rng, (most, k), "bf16")
    packed, together, alone = layouts.pack_panels(w), np.zeros((most, n), np.float32), np.zeros((most, n), np.float32)
    for row in range(most):
        kernel(x[row : row + 1], packed, alone[row : row + 1], 1)
    for rows in (7, 11, most):  # a slice of pairs, or of what was widened
        for team in (1, 2, 3):
            together[:] = 7
            kernel(x, packed, together, rows, team=team)
            assert together[:rows].tobytes() == alone[:rows].tobytes(), (rows, team)
    expected = x.astype(np.float64) @ w.astype(np.float64).T
    assert np.abs(together - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("isa, dtype", ISA_TYPES)
@pytest.mark.parametrize("k, f, bias", [(64, 96, False), (33, 40, True), (16, 3, True)])
def test_linear_glu(isa: str, dtype: str, k: int, f: int, bias: bool) -> None:
    rng = np.random.default_rng(f)
    kernel = Standalone(LinearGlu(k, f, dtype, "silu", bias), ISAS[isa])
    w, b = normal(rng, (2 * f, k), dtype, 0.3), normal(rng, (2 * f,), dtype)
    packed = layouts.pack(Layout.parse("glu"), [w])
    most = 14
    x = normal(rng, (most, k), dtype)

    def run(rows: int, team: int) -> np.ndarray:
        y = np.full((rows + 1, f), 7, NUMPY[dtype])
        kernel(x, packed, *([b] if bias else []), y, rows, team=team)
        assert (y[rows] == 7).all()
        return y[:rows]

    whole = run(most, 1)
    both = x.astype(np.float64) @ w.astype(np.float64).T + (b.astype(np.float64) if bias else 0)
    expected = ACTIVATIONS["silu"](both[:, :f]) * both[:, f:]
    assert np.abs(whole.astype(np.float64) - expected).max() <= 2 * TOLERANCE[dtype] * np.abs(expected).max()
    for rows, team in [(1, 1), (1, 3), (2, 2), (3, 1), (5, 2), (6, 1), (7, 2), (13, 4)]:
        assert run(rows, team).tobytes() == whole[:rows].tobytes(), (rows, team)


@pytest.mark.parametrize("isa", LEVELS)
def test_logits_are_f32_and_nan_stays_in_its_row(isa: str) -> None:
    rng = np.random.default_rng(3)
    kernel = Standalone(Linear(9, 70, "bf16", "f32"), ISAS[isa])
    w, x = normal(rng, (70, 9), "bf16"), normal(rng, (4, 9), "bf16")
    clean, dirty = np.zeros((4, 70), np.float32), np.zeros((4, 70), np.float32)
    kernel(x, layouts.pack_panels(w), clean, 4)
    # k is odd: the last element of a row is paired with a zero, not with the first element of the next row
    x[2] = np.nan
    kernel(x, layouts.pack_panels(w), dirty, 4)
    assert np.isnan(dirty[2]).all()
    np.testing.assert_array_equal(dirty[[0, 1, 3]], clean[[0, 1, 3]])


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize("out, in_", [(1, 1), (64, 2), (65, 7), (130, 48)])
def test_panels_unpack_to_what_was_packed(dtype: str, out: int, in_: int) -> None:
    w = normal(np.random.default_rng(out), (out, in_), dtype)
    packed = layouts.pack_panels(w)
    assert packed.shape == panel_shape(out, in_, dtype)
    np.testing.assert_array_equal(layouts.unpack_panels(packed, out, in_), w)


def test_glu_interleaves_by_half_panels() -> None:
    f = 40
    rows = np.arange(2 * f, dtype=np.float32)[:, None]
    mixed = layouts.interleave_glu(rows)[:, 0]
    assert mixed.size == glu_rows(f) == 128
    np.testing.assert_array_equal(mixed[:32], np.arange(32))
    np.testing.assert_array_equal(mixed[32:64], f + np.arange(32))
    np.testing.assert_array_equal(mixed[64:72], 32 + np.arange(8))
    np.testing.assert_array_equal(mixed[72:96], 0)


def test_unknown_activation_is_refused() -> None:
    with pytest.raises(XllmError, match="activation 'swish'"):
        Linear(8, 8, "f32", "f32", act="swish")
