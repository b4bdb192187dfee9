"""Requests in one pool of KV pages and queries for all their tokens: what the tests of attention share.

The pool is filled with NaN before it is written and tables are -1 past the last token, so touching what a token does
not see shows. The layer at hand lies between two others in every block, which must stay as they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np

from xllm_compiler.kernels.tir.attention.attend import Attend
from xllm_compiler.kernels.tir.attention.kv_address import KvLayout
from xllm_compiler.kernels.tir.attention.kv_append import KvWrite
from xllm_compiler.kernels.tir.isa.levels import ISAS, Isa
from xllm_compiler.kernels.tir.native.standalone import Standalone, aligned

NUMPY = {"bf16": np.dtype(ml_dtypes.bfloat16), "f32": np.dtype(np.float32)}
TOLERANCE = {"bf16": 2e-2, "f32": 2e-5}
EIGHT_BIT_TOLERANCE = 2e-2  # queries and weights, too, have 8 bits where they meet an 8-bit cache
Part = tuple[int, int, int]  # request, first token, last token + 1


def eight_bits(x: np.ndarray) -> np.ndarray:
    """The last axis as integers from -127 to 127 with a scale, and back."""
    wide = x.astype(np.float32)
    top = np.abs(wide).max(axis=-1, keepdims=True)
    back: np.ndarray = np.rint(wide * (np.float32(127) / top)).astype(np.float64) * (top * np.float32(1 / 127))
    return back


class Case:
    """Requests of some lengths. `room`: f32 for parts of divided work."""

    def __init__(
        self,
        lengths: Sequence[int],
        isa: str | Isa,
        dtype: str,
        q_heads: int,
        heads: int,
        k_dim: int,
        v_dim: int,
        room: int = 1 << 16,
        quantized: bool = False,
        tiles: int = 1,
        **options: Any,
    ) -> None:
        rng = np.random.default_rng(q_heads)
        self.dtype, self.group, self.v_dim, self.options = NUMPY[dtype], q_heads // heads, v_dim, options
        self.tolerance = EIGHT_BIT_TOLERANCE if quantized else TOLERANCE[dtype]
        level = ISAS[isa] if isinstance(isa, str) else isa
        layout = KvLayout(dtype, heads, k_dim, v_dim, quantized, tiles)
        self.block = 16 * tiles
        self.width = -(-max(lengths) // self.block)
        pages = len(lengths) * self.width + 2
        scattered = np.random.default_rng(0).permutation(pages)  # apart: keys do not depend on the number of blocks
        self.table = scattered[: len(lengths) * self.width].reshape(-1, self.width).astype(np.int32)
        self.before, self.stride = 64, layout.block_bytes + 192
        self.pool = np.full(pages * self.stride, 0xFF, np.uint8)
        self.k = [rng.standard_normal((n, heads, k_dim)).astype(self.dtype) for n in lengths]
        self.v = [rng.standard_normal((n, heads, v_dim)).astype(self.dtype) for n in lengths]
        self.q = [rng.standard_normal((n, q_heads, k_dim)).astype(self.dtype) for n in lengths]
        self.sinks = rng.standard_normal(q_heads).astype(np.float32)
        self.scale, self.room = k_dim**-0.5, room
        write = Standalone(KvWrite(layout), level)
        for request, n in enumerate(lengths):
            pos, seq = np.arange(n, dtype=np.int32), np.full(n, request, np.int32)
            write(self.layer, self.k[request], self.v[request], pos, seq, self.table, n, self.width, self.stride)
        others = self.pool.reshape(pages, self.stride)
        assert (others[:, : self.before] == 0xFF).all() and (
            others[:, self.before + layout.block_bytes :] == 0xFF
        ).all()
        if quantized:
            self.k, self.v = ([eight_bits(x) for x in xs] for xs in (self.k, self.v))
        self.kernel = Standalone(Attend(layout, q_heads, self.scale, **options), level)

    @property
    def layer(self) -> np.ndarray:
        """The pool from this layer's bytes of block 0 on."""
        return self.pool[self.before :]

    def run(self, parts: Sequence[Part], team: int = 1) -> list[np.ndarray]:
        q = np.concatenate([self.q[request][first:last] for request, first, last in parts])
        pos = np.concatenate([np.arange(first, last) for _, first, last in parts]).astype(np.int32)
        counts = [last - first for _, first, last in parts]
        seq = np.repeat(np.arange(len(parts)), counts).astype(np.int32)
        start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        table = self.table[[request for request, _, _ in parts]].copy()
        for row, (_, _, last) in zip(table, parts, strict=True):
            row[-(-last // self.block) :] = -1
        out = np.zeros((len(q), q.shape[1], self.v_dim), self.dtype)
        sinks = [self.sinks] if self.options.get("sinks") else []
        divide = self.options.get("divide", False)
        parts_args = [np.full(self.room, np.nan, np.float32), aligned((64,), np.uint8)] if divide else []
        sizes = [len(q), len(parts), self.width, self.stride, *([self.room] if divide else [])]
        self.kernel(self.layer, q, pos, seq, start, table, *sinks, out, *parts_args, *sizes, team=team)
        return [out[a:b] for a, b in pairwise(start)]

    def exact(self, request: int, token: int, head: int) -> np.ndarray:
        window, cap = self.options.get("window", 0), self.options.get("softcap", 0.0)
        seen = slice(max(0, token - window + 1) if window else 0, token + 1)
        k, v = (x[request][seen, head // self.group].astype(np.float64) for x in (self.k, self.v))
        score = k @ self.q[request][token, head].astype(np.float64) * self.scale
        if cap:
            score = cap * np.tanh(score / cap)
        weight = np.exp(score)
        rest = np.exp(np.float64(self.sinks[head])) if self.options.get("sinks") else 0.0
        result: np.ndarray = weight @ v / (weight.sum() + rest)
        return result
