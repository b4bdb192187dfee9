"""Where the KV cache lies: blocks for all layers (what programs use) beside an array for each layer.

    python bench/kv_layout.py [--rounds 9] [--isa avx512_bf16] [--layers 28] [--memory 3]

The address is `block * stride + layer offset` in both, so one kernel reads both layouts: in blocks for all layers the
stride is the bytes of all layers, in arrays of their own it is those of one. Attention of Qwen3-0.6B over scattered
blocks of 16 tokens, all layers in turn as in a step. Rounds of both alternate; the median of their ratios counts.
`--memory` (GiB) bounds the pool, so that large cases have fewer layers.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np

from kernels import BF16, KV, Q_HEADS, aligned, filled
from xllm_compiler.artifact.cpu_isa import machine_isas
from xllm_compiler.kernels.tir.attention.attend import Attend
from xllm_compiler.kernels.tir.isa.levels import ISAS
from xllm_compiler.kernels.tir.native.standalone import Standalone, Team

CASES = ((1, 4096, 1), (8, 4096, 1), (32, 4096, 1), (1, 512, 512), (1, 4096, 512))
"""Requests, tokens of each, and how many of them are of this step."""


def calls(requests: int, context: int, chunk: int, layers: int) -> tuple[list[Any], list[Any]]:
    """The arguments of each layer's call in both layouts, over one pool."""
    width = -(-context // 16)
    blocks = requests * width
    pool = filled((layers * blocks * KV.block_bytes // 2,), BF16).view(np.uint8)
    rows = requests * chunk
    q, out = filled((rows, Q_HEADS, KV.k_dim), BF16), aligned((rows, Q_HEADS, KV.v_dim), BF16)
    pos = np.tile(np.arange(context - chunk, context, dtype=np.int32), requests)
    seq = np.repeat(np.arange(requests, dtype=np.int32), chunk)
    start = np.arange(requests + 1, dtype=np.int32) * chunk
    table = np.random.default_rng(0).permutation(blocks).astype(np.int32).reshape(requests, width)

    def of(stride: int, step: int) -> list[Any]:
        sizes = rows, requests, width, stride
        return [(pool[layer * step :], q, pos, seq, start, table, out, *sizes) for layer in range(layers)]

    return of(layers * KV.block_bytes, KV.block_bytes), of(KV.block_bytes, blocks * KV.block_bytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--isa", choices=list(ISAS), default=machine_isas()[-1])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--memory", type=float, default=3.0)
    options = parser.parse_args()
    kernel = Standalone(Attend(KV, Q_HEADS, KV.k_dim**-0.5), ISAS[options.isa])
    print(f"{options.isa}, {options.threads} threads; microseconds a layer")
    print("requests context  chunk  layers  all layers  each its own  ratio")
    with Team(kernel.code, options.threads) as team:
        for requests, context, chunk in CASES:
            size = requests * context * KV.block_bytes // 16
            layers = max(2, min(options.layers, int(options.memory * 2**30) // size))
            arguments = calls(requests, context, chunk, layers)  # kept: what is packed are addresses
            packed = [[kernel.pack(*call) for call in each] for each in arguments]
            found: list[list[float]] = [[], []]
            for turn in range(options.rounds + 1):
                for layout in (0, 1) if turn % 2 else (1, 0):
                    begin = time.perf_counter()
                    for call in packed[layout]:
                        team.run(kernel.step, call)
                    if turn:  # the first one maps the pages
                        found[layout].append((time.perf_counter() - begin) / layers * 1e6)
            ratio = statistics.median(a / b for a, b in zip(*found, strict=True))
            blocked, apart = map(statistics.median, found)
            print(
                f"{requests:8} {context:8} {chunk:6} {layers:7} {blocked:11.0f} {apart:13.0f} {ratio:6.3f}", flush=True
            )


if __name__ == "__main__":
    main()
