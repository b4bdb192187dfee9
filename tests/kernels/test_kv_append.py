"""Writing the cache: every slot read back through the layout that `kv_address` documents, against numpy."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from levels import ISA_TYPES

from xllm_compiler.errors import XllmError
from xllm_compiler.kernels.tir.attention.kv_address import KvLayout
from xllm_compiler.kernels.tir.attention.kv_append import KvAppend, KvWrite
from xllm_compiler.kernels.tir.codegen.kernel import TILE_TOKENS
from xllm_compiler.kernels.tir.isa.levels import ISAS
from xllm_compiler.kernels.tir.native.standalone import Standalone

NUMPY = {"bf16": np.dtype(ml_dtypes.bfloat16), "f32": np.dtype(np.float32)}
TOLERANCE = {"bf16": 6e-3, "f32": 1e-5}
TABLE = np.array([[3, 1, -1], [0, 4, 2]], np.int32)
POS = np.concatenate([np.arange(5, 15), np.arange(11, 22)]).astype(np.int32)
SEQ = np.repeat(np.array([0, 1], np.int32), [10, 11])
ROWS, WIDTH, PAGES = POS.size, TABLE.shape[1], 5


def slots(pool: np.ndarray, layout: KvLayout) -> tuple[np.ndarray, np.ndarray]:
    """(K, V) as [pages, heads, 16, dim]."""
    dtype = NUMPY[layout.dtype]
    heads = pool.reshape(-1, layout.heads, layout.head_bytes)
    split = TILE_TOKENS * layout.k_dim * layout.element_bytes
    k = np.ascontiguousarray(heads[..., :split]).view(dtype)
    v = np.ascontiguousarray(heads[..., split:]).view(dtype)
    lead = k.shape[:2]
    if layout.dtype == "f32":
        return k.reshape(*lead, layout.k_dim, TILE_TOKENS).swapaxes(2, 3), v.reshape(*lead, TILE_TOKENS, layout.v_dim)
    k = (
        k.reshape(*lead, layout.k_dim // 2, TILE_TOKENS, 2)
        .transpose(0, 1, 3, 2, 4)
        .reshape(*lead, TILE_TOKENS, layout.k_dim)
    )
    v = (
        v.reshape(*lead, TILE_TOKENS // 2, layout.v_dim, 2)
        .transpose(0, 1, 2, 4, 3)
        .reshape(*lead, TILE_TOKENS, layout.v_dim)
    )
    return k, v


@pytest.mark.parametrize("isa, dtype", ISA_TYPES)
@pytest.mark.parametrize(
    "q_heads, heads, k_dim, v_dim, rotary, style, norm",
    [(4, 2, 64, 64, 64, "half", True), (6, 3, 20, 34, 12, "interleaved", False), (2, 1, 48, 16, 0, "half", True)],
)
def test_append(
    isa: str, dtype: str, q_heads: int, heads: int, k_dim: int, v_dim: int, rotary: int, style: str, norm: bool
) -> None:
    rng = np.random.default_rng(0)
    layout = KvLayout(dtype, heads, k_dim, v_dim)
    q_end, k_end = q_heads * k_dim, (q_heads + heads) * k_dim
    qkv = rng.standard_normal((ROWS, k_end + heads * v_dim)).astype(NUMPY[dtype])
    qw, kw = (rng.standard_normal(k_dim).astype(NUMPY[dtype]) for _ in range(2))
    angle = rng.uniform(0, 6, (ROWS, rotary // 2))
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)

    def head(part: np.ndarray, weight: np.ndarray) -> np.ndarray:
        x = part.reshape(ROWS, -1, k_dim).astype(np.float64)
        if norm:
            x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * (weight.astype(np.float64) + 0.5)
        half = rotary // 2
        first, second = (
            (slice(0, half), slice(half, rotary)) if style == "half" else (slice(0, rotary, 2), slice(1, rotary, 2))
        )
        a, b, c, s = x[..., first].copy(), x[..., second].copy(), cos[:, None], sin[:, None]
        x[..., first], x[..., second] = a * c - b * s, b * c + a * s
        return x

    kernel = Standalone(KvAppend(layout, q_heads, rotary, style, norm, norm, 1e-6, 0.5), ISAS[isa])
    extra = [cos, sin] * (rotary > 0) + [qw, kw] * norm
    results = []
    for team in (1, 3):
        pool = np.full(PAGES * layout.block_bytes, 0x7F, np.uint8)
        q = np.zeros((ROWS, q_heads, k_dim), NUMPY[dtype])
        kernel(pool, qkv, POS, SEQ, TABLE, *extra, q, ROWS, WIDTH, layout.block_bytes, team=team)
        results.append(pool.tobytes() + q.tobytes())
    assert results[0] == results[1]

    expected = head(qkv[:, :q_end], qw)
    assert np.abs(q.astype(np.float64) - expected).max() <= TOLERANCE[dtype] * np.abs(expected).max()
    k, v = slots(pool, layout)
    where = TABLE[SEQ, POS // TILE_TOKENS], slice(None), POS % TILE_TOKENS
    expected = head(qkv[:, q_end:k_end], kw)
    assert np.abs(k[where].astype(np.float64) - expected).max() <= TOLERANCE[dtype] * np.abs(expected).max()
    assert v[where].tobytes() == qkv[:, k_end:].tobytes()
    untouched = np.ones((PAGES, TILE_TOKENS), bool)
    untouched[TABLE[SEQ, POS // TILE_TOKENS], POS % TILE_TOKENS] = False
    for written in (k, v):
        rest = np.ascontiguousarray(written.swapaxes(1, 2)[untouched])
        assert (rest.view(np.uint8) == 0x7F).all()

    # the unfused kernel writes the same slots
    again = np.full_like(pool, 0x7F)
    keys, values = np.ascontiguousarray(k[where]), np.ascontiguousarray(v[where])
    Standalone(KvWrite(layout), ISAS[isa])(
        again, keys, values, POS, SEQ, TABLE, ROWS, WIDTH, layout.block_bytes, team=2
    )
    assert again.tobytes() == pool.tobytes()


def test_odd_head_dims_are_refused() -> None:
    with pytest.raises(XllmError, match="must be even"):
        KvLayout("bf16", 2, 65, 64)
