"""Each hot CPU kernel alone, as a share of what the machine gave in the same minute.

    python bench/kernels.py [--threads 2] [--isa avx512_bf16] [--rounds 5] [--only linear]

Shapes are those of Qwen3-0.6B in bf16. A case rotates through copies of its weights or pages that together exceed the
caches, so that "bytes" come from memory. Limits and kernels take turns; the best round of each is compared, where a
kernel's round is the lower quartile of its calls: on a shared machine that is what was least disturbed. A share of
bandwidth counts bytes that must be read once, a share of peak counts useful operations (half of a causal square).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from limits import Probe

from xllm_compiler.artifact.cpu_isa import machine_isas
from xllm_compiler.kernels.tir.attention.attend import Attend
from xllm_compiler.kernels.tir.attention.kv_address import KvLayout
from xllm_compiler.kernels.tir.attention.kv_append import KvAppend
from xllm_compiler.kernels.tir.isa.levels import ISAS, Isa
from xllm_compiler.kernels.tir.linear.linear import Linear, LinearGlu
from xllm_compiler.kernels.tir.native.standalone import Standalone, Team, aligned
from xllm_compiler.kernels.tir.rows.norm_rows import NormRows
from xllm_compiler.kernels.tir.rows.norms import AddRmsNorm
from xllm_compiler.kernels.tir.rows.quantize import QuantizeRows
from xllm_compiler.weight_formats import IntegerFormat, glu_rows, panel_shape, parse_format

BF16 = ml_dtypes.bfloat16
ROTATION_BYTES = 200 << 20
ROWS = (1, 2, 4, 8, 16, 32, 64, 512)
HIDDEN, FFN, Q_HEADS, KV = 1024, 3072, 16, KvLayout("bf16", 8, 128, 128)
QKV = (Q_HEADS + KV.heads) * KV.k_dim + KV.heads * KV.v_dim


@dataclass
class Case:
    """`calls` are argument lists to take in turn; `bytes` and `flops` are of one call, `integers`: their kind."""

    name: str
    kernel: Standalone
    calls: list[tuple[Any, ...]]
    bytes: float
    flops: float
    integers: bool = False


def filled(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Small finite numbers, written so that every page is mapped."""
    array = aligned(shape, dtype)
    pattern = (np.random.default_rng(0).standard_normal(4096) * 0.03).astype(dtype)
    flat = array.reshape(-1)
    for start in range(0, flat.size, pattern.size):
        flat[start : start + pattern.size] = pattern[: flat.size - start]
    return array


def linear_cases(isa: Isa) -> Iterator[Case]:
    shapes = [("qkv", HIDDEN, QKV), ("o", Q_HEADS * KV.v_dim, HIDDEN), ("down", FFN, HIDDEN)]
    for name, k, n in shapes:
        kernel = Standalone(Linear(k, n, "bf16", "bf16"), isa)
        packed = panel_shape(n, k, "bf16")
        yield from matrix_cases(f"linear {name} {k}x{n}", kernel, packed, k, n, n)
    kernel = Standalone(LinearGlu(HIDDEN, FFN, "bf16"), isa)
    packed = panel_shape(glu_rows(FFN), HIDDEN, "bf16")
    yield from matrix_cases(f"linear_glu {HIDDEN}x2x{FFN}", kernel, packed, HIDDEN, FFN, 2 * FFN)


def matrix_cases(
    name: str, kernel: Standalone, packed: tuple[int, ...], k: int, columns: int, n: int
) -> Iterator[Case]:
    size = int(np.prod(packed)) * 2
    weights = [filled(packed, BF16) for _ in range(-(-ROTATION_BYTES // size))]
    for rows in ROWS:
        x, y = filled((rows, k), BF16), aligned((rows, columns), BF16)
        calls = [(x, w, y, rows) for w in (weights if rows < 512 else weights[:4])]
        yield Case(f"{name} rows={rows}", kernel, calls, size, 2 * rows * k * n)


def quantized_cases(isa: Isa) -> Iterator[Case]:
    """Linear layers on quantized weights; "w" before a form: by bf16 activations, widened in registers."""
    for form in ("q8", "q4grid32", "q4grid16", "q4g32", "q4g128", "wq8", "wq4g32", "wq4g128"):
        q = parse_format(form.removeprefix("w"))
        for name, k, n in (("qkv", HIDDEN, QKV), ("down", FFN, HIDDEN)):
            kernel = Standalone(Linear(k, n, "bf16", "bf16", weights=form), isa)
            shape = q.shape(n, k)
            size = int(np.prod(shape))
            weights = [aligned(shape, np.uint8) for _ in range(-(-ROTATION_BYTES // size))]
            for w in weights:
                w[:] = np.random.default_rng(0).integers(0, 32, shape[1], np.uint8)
            for rows in ROWS:
                x: tuple[np.ndarray, ...] = (filled((rows, k), BF16),)
                if not form.startswith("w"):
                    integers = np.random.default_rng(1).integers(-127, 128, (rows, q.padded(k)), np.int8)
                    x = (integers, filled((rows,), np.float32), np.zeros((rows, q.groups(k)), np.int32))
                y = aligned((rows, n), BF16)
                calls = [(*x, w, y, rows) for w in (weights if rows < 512 else weights[:4])]
                case = f"linear {name} {k}x{n} {form} rows={rows}"
                yield Case(case, kernel, calls, size, 2 * rows * k * n, integers=len(x) > 1)


def attend_cases(isa: Isa) -> Iterator[Case]:
    kernel = Standalone(Attend(KV, Q_HEADS, KV.k_dim**-0.5), isa)
    for requests, context, chunk in ((1, 2048, 1), (8, 512, 1), (1, 512, 512), (1, 4096, 512)):
        width = -(-context // 16)
        pages = requests * width
        layer = pages * KV.block_bytes
        layers = -(-ROTATION_BYTES // layer) if chunk == 1 else 1
        pool = filled((layers * layer // 2,), BF16).view(np.uint8)
        rows = requests * chunk
        q, out = filled((rows, Q_HEADS, KV.k_dim), BF16), aligned((rows, Q_HEADS, KV.v_dim), BF16)
        pos = np.tile(np.arange(context - chunk, context, dtype=np.int32), requests)
        seq = np.repeat(np.arange(requests, dtype=np.int32), chunk)
        start = np.arange(requests + 1, dtype=np.int32) * chunk
        table = np.random.default_rng(0).permutation(pages).astype(np.int32).reshape(requests, width)
        stride = layers * KV.block_bytes
        calls = [
            (pool[at * KV.block_bytes :], q, pos, seq, start, table, out, rows, requests, width, stride)
            for at in range(layers)
        ]
        flops = float((pos + 1).sum()) * Q_HEADS * 2 * (KV.k_dim + KV.v_dim)
        name = f"attend requests={requests} context={context} chunk={chunk}"
        yield Case(name, kernel, calls, layer, flops)


def small_cases(isa: Isa) -> Iterator[Case]:
    for rows in (1, 512):
        x, y = filled((rows, HIDDEN), BF16), aligned((rows, HIDDEN), BF16)
        norm = Standalone(AddRmsNorm(HIDDEN, "bf16", 1e-6), isa)
        w = filled((HIDDEN,), BF16)
        yield Case(f"add_rms_norm rows={rows}", norm, [(x, x, w, y, aligned(x.shape, BF16), rows)], 0, 0)
        for group in (0, 32):
            form = IntegerFormat(8, group)
            integers, scales = aligned((rows, HIDDEN), np.int8), aligned((rows,), np.float32)
            sums = aligned((rows, form.groups(HIDDEN)), np.int32)
            norm_rows = Standalone(NormRows("rms", HIDDEN, "bf16", 1e-6, group=group), isa)
            yield Case(f"norm_rows {form} rows={rows}", norm_rows, [(x, w, integers, scales, sums, rows)], 0, 0)
            quantize = Standalone(QuantizeRows(HIDDEN, "bf16", group), isa)
            yield Case(f"quantize_rows {form} rows={rows}", quantize, [(x, integers, scales, sums, rows)], 0, 0)
        append = Standalone(KvAppend(KV, Q_HEADS, KV.k_dim, "half", True, True), isa)
        width = -(-rows // 16)
        pool = filled((width * KV.block_bytes // 2,), BF16).view(np.uint8)
        pos, seq = np.arange(rows, dtype=np.int32), np.zeros(rows, np.int32)
        table = np.arange(width, dtype=np.int32).reshape(1, width)
        angles = filled((rows, KV.k_dim // 2), np.float32)
        q, qw = aligned((rows, Q_HEADS, KV.k_dim), BF16), filled((KV.k_dim,), BF16)
        sizes = rows, width, KV.block_bytes
        arguments = (pool, filled((rows, QKV), BF16), pos, seq, table, angles, angles, qw, qw, q, *sizes)
        yield Case(f"kv_append rows={rows}", append, [arguments], 0, 0)


FAMILIES: dict[str, Callable[[Isa], Iterator[Case]]] = {
    "linear": linear_cases,
    "quantized": quantized_cases,
    "attend": attend_cases,
    "small": small_cases,
}


def quiet_seconds(case: Case, threads: int, seconds: float) -> float:
    """The lower quartile of single calls within some `seconds`; the first turn through the copies does not count."""
    packed = [case.kernel.pack(*call) for call in case.calls]
    times = []
    with Team(case.kernel.code, threads) as team:
        for call in packed:
            team.run(case.kernel.step, call)
        deadline = time.perf_counter() + seconds
        while time.perf_counter() < deadline:
            for call in packed:
                begin = time.perf_counter()
                team.run(case.kernel.step, call)
                times.append(time.perf_counter() - begin)
    return sorted(times)[len(times) // 4]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--isa", choices=list(ISAS), default=machine_isas()[-1])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=list(FAMILIES))
    options = parser.parse_args()
    probe = Probe(options.threads)
    dots = "bf16_dots" if ISAS[options.isa].has_bf16_dot else "f32_fmas"
    print(f"{options.isa}, {options.threads} thread(s)")
    print(f"{'kernel':44} {'us':>9} {'GB/s':>7} {'of read':>8} {'GFLOP/s':>8} {'of peak':>8}")
    for family, cases in FAMILIES.items():
        if options.only not in (None, family):
            continue
        for case in cases(ISAS[options.isa]):
            read = peak = 0.0
            best = float("inf")
            for _ in range(options.rounds):
                read = max(read, probe.read_bandwidth())
                kind = "int8_dots" if case.integers and ISAS[options.isa].has_int8_dot else dots
                peak = max(peak, probe.arithmetic(kind, 500_000))
                best = min(best, quiet_seconds(case, options.threads, 0.2))
            line = f"{case.name:44} {best * 1e6:9.1f}"
            if case.bytes:
                line += f" {case.bytes / best / 1e9:7.1f} {case.bytes / best / read:8.0%}"
                line += f" {case.flops / best / 1e9:8.1f} {case.flops / best / peak:8.0%}"
            print(line, flush=True)


if __name__ == "__main__":
    main()
