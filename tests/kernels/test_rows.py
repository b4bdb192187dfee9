"""Norms, embedding and rotary kernels against numpy; bit for bit over rows and teams."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from levels import ISA_TYPES

from tests.kernels.grid_bytes import bytes_on_grids
from xllm_compiler.ir import quant
from xllm_compiler.kernels import layouts
from xllm_compiler.kernels.tir.attention.rope import Rope
from xllm_compiler.kernels.tir.isa.levels import ISAS
from xllm_compiler.kernels.tir.native.standalone import Standalone
from xllm_compiler.kernels.tir.rows.embedding import Embedding
from xllm_compiler.kernels.tir.rows.norms import AddRmsNorm, LayerNorm, RmsNorm
from xllm_compiler.weight_formats import GridFormat, parse_format

NUMPY = {"bf16": np.dtype(ml_dtypes.bfloat16), "f32": np.dtype(np.float32)}
TOLERANCE = {"bf16": 5e-3, "f32": 2e-6}
ROWS = 7


def normal(shape: tuple[int, ...], dtype: str, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(NUMPY[dtype])


def close(actual: np.ndarray, expected: np.ndarray, dtype: str) -> None:
    assert np.abs(actual.astype(np.float64) - expected).max() <= TOLERANCE[dtype] * np.abs(expected).max()


def rms(x: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


@pytest.mark.parametrize("isa, dtype", ISA_TYPES)
@pytest.mark.parametrize("n", [5, 100, 256])
def test_rms_norms(isa: str, dtype: str, n: int) -> None:
    x, res, w = normal((ROWS, n), dtype), normal((ROWS, n), dtype, 1), normal((n,), dtype, 2)
    y, total, bare = np.zeros_like(x), np.zeros_like(x), np.zeros_like(x)
    Standalone(RmsNorm(n, dtype, 1e-5, offset=1.0), ISAS[isa])(x, w, y, ROWS, team=2)
    close(y, rms(x.astype(np.float64), 1e-5) * (w.astype(np.float64) + 1), dtype)
    Standalone(RmsNorm(n, dtype, 1e-5, weight=False), ISAS[isa])(x, bare, ROWS)
    close(bare, rms(x.astype(np.float64), 1e-5), dtype)

    kernel = Standalone(AddRmsNorm(n, dtype, 1e-6), ISAS[isa])
    kernel(x, res, w, y, total, ROWS, team=3)
    rounded = (x.astype(np.float32) + res.astype(np.float32)).astype(NUMPY[dtype])
    np.testing.assert_array_equal(total, rounded)
    close(y, rms(rounded.astype(np.float64), 1e-6) * w.astype(np.float64), dtype)

    in_place, alone = res.copy(), np.zeros_like(y)
    kernel(x, in_place, w, alone, in_place, ROWS)
    assert alone.tobytes() == y.tobytes() and in_place.tobytes() == total.tobytes()
    kernel(x[3:4].copy(), res[3:4].copy(), w, alone[:1], total[:1], 1, team=2)
    assert alone[:1].tobytes() == y[3:4].tobytes()


@pytest.mark.parametrize("isa, dtype", ISA_TYPES)
@pytest.mark.parametrize("n, weight, bias", [(100, True, True), (64, True, False), (21, False, False)])
def test_layer_norm(isa: str, dtype: str, n: int, weight: bool, bias: bool) -> None:
    x, w, b = normal((ROWS, n), dtype) + NUMPY[dtype].type(3), normal((n,), dtype, 1), normal((n,), dtype, 2)
    y = np.zeros_like(x)
    Standalone(LayerNorm(n, dtype, 1e-5, weight, bias), ISAS[isa])(x, *[w] * weight, *[b] * bias, y, ROWS, team=2)
    exact = x.astype(np.float64)
    expected = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(exact.var(-1, keepdims=True) + 1e-5)
    close(y, expected * (w.astype(np.float64) if weight else 1) + (b.astype(np.float64) if bias else 0), dtype)


@pytest.mark.parametrize("isa, dtype", ISA_TYPES)
@pytest.mark.parametrize("dim", [1, 37, 64])
def test_embedding_copies_rows_and_panels(isa: str, dtype: str, dim: int) -> None:
    table = normal((130, dim), dtype)
    table[64] = np.array(1e-39, NUMPY[dtype])  # a denormal is a value like any other
    ids = np.array([0, 129, 64, 63, 7, 7, 100], np.int32)
    for layout, w in (("row", table), ("panel", layouts.pack_panels(table))):
        y = np.zeros((ROWS, dim), NUMPY[dtype])
        Standalone(Embedding(dim, dtype, layout), ISAS[isa])(ids, w, y, ROWS, team=2)
        assert y.tobytes() == table[ids].tobytes()


@pytest.mark.parametrize("isa, dtype", ISA_TYPES)
@pytest.mark.parametrize("dim", [1, 37, 64, 144])
@pytest.mark.parametrize("form", ["q8", "q4g32z", "q4grid16", "q4grid32"])
def test_embedding_widens_quantized_rows(isa: str, dtype: str, dim: int, form: str) -> None:
    rng, q = np.random.default_rng(dim), parse_format(form)
    values = rng.integers(0, 1 << q.bits, (130, dim)).astype(np.uint8)
    if isinstance(q, GridFormat):
        values = bytes_on_grids(rng, 130, dim, q.grid)
    scales = rng.uniform(0.01, 0.1, (130, q.groups(dim))).astype(np.float16 if q.group else np.float32)
    zeros = rng.integers(0, 16, scales.shape).astype(np.uint8) if q.zeros else None
    ids, y = np.array([0, 129, 64, 63, 7, 7, 100], np.int32), np.zeros((ROWS, dim), NUMPY[dtype])
    packed = layouts.pack_quantized(q, values, scales, zeros)
    Standalone(Embedding(dim, dtype, form), ISAS[isa])(ids, packed, y, ROWS, team=2)
    each = (scales.repeat(q.group, axis=1)[:, :dim] if q.group else scales).astype(np.float32)
    point = q.zero if zeros is None else zeros.repeat(q.group, axis=1)[:, :dim].astype(np.float32)
    want = ((values.astype(np.float32) - point) * each)[ids]
    assert y.tobytes() == want.astype(NUMPY[dtype]).tobytes()
    if block := quant.rotation(dim):
        Standalone(Embedding(dim, dtype, form, block), ISAS[isa])(ids, packed, y, ROWS, team=2)
        assert y.tobytes() == quant.rotate(want, block).astype(NUMPY[dtype]).tobytes()


def rotated(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, rotary: int, style: str) -> np.ndarray:
    """x [rows, heads, dim] in double precision."""
    y = x.astype(np.float64).copy()
    first = slice(0, rotary // 2) if style == "half" else slice(0, rotary, 2)
    second = slice(rotary // 2, rotary) if style == "half" else slice(1, rotary, 2)
    a, b, c, s = y[..., first].copy(), y[..., second].copy(), cos[:, None], sin[:, None]
    y[..., first], y[..., second] = a * c - b * s, b * c + a * s
    return y


@pytest.mark.parametrize("isa, dtype", ISA_TYPES)
@pytest.mark.parametrize("dim, rotary, style", [(64, 64, "half"), (20, 12, "interleaved"), (80, 32, "half")])
def test_rope(isa: str, dtype: str, dim: int, rotary: int, style: str) -> None:
    x = normal((ROWS, 3, dim), dtype)
    angle = np.random.default_rng(1).uniform(0, 6, (ROWS, rotary // 2))
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    kernel = Standalone(Rope(3, dim, rotary, style, dtype), ISAS[isa])
    y = np.zeros_like(x)
    kernel(x, cos, sin, y, ROWS, team=2)
    close(y, rotated(x, cos, sin, rotary, style), dtype)
    kernel(x, cos, sin, x, ROWS)
    assert x.tobytes() == y.tobytes()
