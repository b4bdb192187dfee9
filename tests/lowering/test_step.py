"""A hand-written transformer step: compiled code against the interpreter, on every instruction set of this machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from xllm_compiler.artifact.cpu_isa import machine_isas
from xllm_compiler.dims import DimScope
from xllm_compiler.interp import run
from xllm_compiler.kernels.tir.isa.levels import ISAS
from xllm_compiler.lowering.barriers import barriers
from xllm_compiler.lowering.kernel_registry import Call
from xllm_compiler.lowering.storage import Storage

HIDDEN, HEADS, KV_HEADS, DIM, FFN, VOCAB, TABLE = 64, 4, 2, 16, 96, 200, 4
KV_TYPE = "kv<{t}, heads=2, k=16, v=16, page=16>[P]"
QKV = (HEADS + 2 * KV_HEADS) * DIM


def _layer(i: int, t: str) -> str:
    return f"""
  %n{i} = param(name="n{i}") : {t}[{HIDDEN}]
  %wq{i} = param(name="wq{i}") : {t}[{HEADS * DIM}, {HIDDEN}]
  %wk{i} = param(name="wk{i}") : {t}[{KV_HEADS * DIM}, {HIDDEN}]
  %wv{i} = param(name="wv{i}") : {t}[{KV_HEADS * DIM}, {HIDDEN}]
  %wqkv{i} = t.concat(%wq{i}, %wk{i}, %wv{i}, axis=0) : {t}[{QKV}, {HIDDEN}]
  %b{i} = param(name="b{i}") : {t}[{QKV}]
  %qn{i} = param(name="qn{i}") : {t}[{DIM}]
  %wo{i} = param(name="wo{i}") : {t}[{HIDDEN}, {HEADS * DIM}]
  %m{i} = param(name="m{i}") : {t}[{HIDDEN}]
  %wg{i} = param(name="wg{i}") : {t}[{2 * FFN}, {HIDDEN}]
  %wd{i} = param(name="wd{i}") : {t}[{HIDDEN}, {FFN}]
  %x{i} = nn.rms_norm(%h{i}, w=%n{i}, eps=1e-05) : {t}[N, {HIDDEN}]
  %qkv{i} = nn.linear(%x{i}, %wqkv{i}, bias=%b{i}) : {t}[N, {QKV}]
  %new{i}, %q{i} = kv.append(%kv{i}, %qkv{i}, %pos, %seq, %table, cos=%cos, sin=%sin, qw=%qn{i}, kw=%qn{i},
      q_heads={HEADS}, eps=1e-06) : {KV_TYPE.format(t=t)}, {t}[N, {HEADS}, {DIM}]
  %a{i} = kv.attend(%new{i}, %q{i}, %pos, %seq, %start, %table, scale=0.25) : {t}[N, {HEADS}, {DIM}]
  %f{i} = t.reshape(%a{i}, shape=[N, {HEADS * DIM}]) : {t}[N, {HEADS * DIM}]
  %o{i} = nn.linear(%f{i}, %wo{i}) : {t}[N, {HIDDEN}]
  %y{i}, %s{i} = nn.add_rms_norm(%o{i}, %h{i}, %m{i}, eps=1e-05) : {t}[N, {HIDDEN}], {t}[N, {HIDDEN}]
  %g{i} = nn.linear_glu(%y{i}, %wg{i}) : {t}[N, {FFN}]
  %h{i + 1} = nn.linear(%g{i}, %wd{i}, residual=%s{i}) : {t}[N, {HIDDEN}]"""


def _text(t: str) -> str:
    kv = KV_TYPE.format(t=t)
    return f"""func @step(%ids: i32[N], %pos: i32[N], %seq: i32[N], %start: i32[B + 1],
    %table: i32[B, {TABLE}], %sel: i32[S],
    %kv0: {kv}, %kv1: {kv}) -> (f32[S, {VOCAB}], {kv} alias %kv0, {kv} alias %kv1) {{
  %w = param(name="w") : {t}[{VOCAB}, {HIDDEN}]
  %ct = param(name="cos") : f32[64, {DIM // 2}]
  %st = param(name="sin") : f32[64, {DIM // 2}]
  %cos = nn.embedding(%pos, %ct) : f32[N, {DIM // 2}]
  %sin = nn.embedding(%pos, %st) : f32[N, {DIM // 2}]
  %h0 = nn.embedding(%ids, %w) : {t}[N, {HIDDEN}]{_layer(0, t)}{_layer(1, t)}
  %last = t.take(%h2, %sel, axis=0) : {t}[S, {HIDDEN}]
  %wf = param(name="nf") : {t}[{HIDDEN}]
  %z = nn.rms_norm(%last, w=%wf, eps=1e-05) : {t}[S, {HIDDEN}]
  %l = nn.linear(%z, %w) : {t}[S, {VOCAB}]
  %logits = t.cast(%l, dtype=f32) : f32[S, {VOCAB}]
  return %logits, %new0, %new1
}}
"""


def _params(t: str) -> dict[str, Any]:
    rng = np.random.default_rng(7)
    dtype = np.float32 if t == "f32" else ml_dtypes.bfloat16

    def weight(*shape: int) -> Any:
        return (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(dtype)

    out: dict[str, Any] = {"w": weight(VOCAB, HIDDEN), "nf": weight(HIDDEN) + dtype(1)}
    angle = np.outer(np.arange(64), 100.0 ** (-np.arange(DIM // 2) / (DIM // 2)))
    out |= {"cos": np.cos(angle).astype(np.float32), "sin": np.sin(angle).astype(np.float32)}
    for i in range(2):
        out |= {
            f"n{i}": weight(HIDDEN) + dtype(1),
            f"m{i}": weight(HIDDEN) + dtype(1),
            f"qn{i}": weight(DIM) + dtype(1),
        }
        out |= {f"wq{i}": weight(HEADS * DIM, HIDDEN), f"wk{i}": weight(KV_HEADS * DIM, HIDDEN)}
        out |= {f"wv{i}": weight(KV_HEADS * DIM, HIDDEN), f"b{i}": weight(QKV), f"wo{i}": weight(HIDDEN, HEADS * DIM)}
        out |= {f"wg{i}": weight(2 * FFN, HIDDEN), f"wd{i}": weight(HIDDEN, FFN)}
    return {k: v.astype(np.float32) if k in ("cos", "sin") else v.astype(dtype) for k, v in out.items()}


def _batch(lengths: list[tuple[int, int]], sel: list[int], seed: int = 0) -> tuple[dict[str, Any], dict[str, int]]:
    """A step of requests given as (tokens already cached, tokens now); pages are handed out in a scattered order."""
    rng = np.random.default_rng(seed)
    n, b = sum(now for _, now in lengths), len(lengths)
    pages = np.arange(TABLE * 8)[::-1].reshape(8, TABLE)[:b]
    pos = np.concatenate([np.arange(old, old + now) for old, now in lengths])
    seq = np.repeat(np.arange(b), [now for _, now in lengths])
    start = np.concatenate([[0], np.cumsum([now for _, now in lengths])])
    given = {"ids": rng.integers(0, VOCAB, n), "pos": pos, "seq": seq, "start": start, "table": pages, "sel": sel}
    return {k: np.asarray(v, np.int32) for k, v in given.items()}, {"N": n, "B": b, "S": len(sel), "P": TABLE * 8}


STEPS = [
    _batch([(0, 20), (0, 1), (0, 7)], [19, 27], 1),  # prefill of three
    _batch([(20, 1), (1, 1), (7, 1)], [0, 1, 2], 2),  # they decode
    _batch([(21, 1)], [], 3),  # alone, no logits wanted
    _batch([(22, 5), (2, 30)], [4, 0, 34], 4),  # chunks, rows out of order
]


# in f32 levels with the bf16 dot product have no code of their own, and without quantization that of bytes changes none
CASES = [
    (t, isa)
    for isa in machine_isas()
    for t in ("f32", "bf16")
    if not ISAS[isa].without_int8_dot and (t == "bf16" or not ISAS[isa].has_bf16_dot)
]


@pytest.mark.parametrize(("t", "isa"), CASES)
def test_steps_match_the_interpreter(build: Any, t: str, isa: str) -> None:
    params = _params(t)
    c = build(_text(t), params, isas=[isa])
    names = {(x.name, x.layout) for x in c.lowering.weights}
    assert ("w", "panel") in names and ("w", "row") not in names, "tied embeddings are stored once"
    dtype = np.float32 if t == "f32" else ml_dtypes.bfloat16
    cache = [np.zeros((TABLE * 8 * 16, KV_HEADS, 2 * DIM), dtype) for _ in range(2)]
    pool = None
    for inputs, dims in STEPS:
        want, *cache = run(c.module, "step", {**inputs, "kv0": cache[0], "kv1": cache[1]}, params, dims)
        got, after = c.step(inputs, dims, isa, 1, pool)
        again, after2 = c.step(inputs, dims, isa, 2, pool)
        np.testing.assert_array_equal(got.view(np.uint32), again.view(np.uint32))
        np.testing.assert_array_equal(after, after2)
        pool = after
        if t == "f32":
            np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
        else:  # two layers of bf16 roundings, and the last one is not done at all in compiled code
            np.testing.assert_allclose(got, want, rtol=0.05, atol=0.06)


def test_a_request_has_the_same_bits_alone_and_in_company(build: Any) -> None:
    c = build(_text("bf16"), _params("bf16"))
    isa = c.lowering.isas[0]
    inputs, dims = _batch([(0, 9), (0, 13)], [8, 21], 5)
    both, _ = c.step(inputs, dims, isa, 2)
    alone = {k: v[9:] for k, v in inputs.items() if k in ("ids", "pos")}
    alone |= {"seq": np.zeros(13, np.int32), "start": np.asarray([0, 13], np.int32), "table": inputs["table"][1:]}
    alone |= {"sel": np.asarray([12], np.int32)}
    single, _ = c.step(alone, {**dims, "N": 13, "B": 1, "S": 1}, isa, 1)
    np.testing.assert_array_equal(single[0].view(np.uint32), both[1].view(np.uint32))


def test_same_bytes_twice(build: Any, forget_kernels: Callable[[], None]) -> None:
    one = build(_text("bf16"), _params("bf16"))
    forget_kernels()
    two = build(_text("bf16"), _params("bf16"), fresh=True)
    for name in one.lowering.files:
        assert (one.folder / name).read_bytes() == (two.folder / name).read_bytes(), name
    assert one.lowering == two.lowering


def test_layers_share_kernels_and_barriers_are_few(build: Any) -> None:
    c = build(_text("bf16"), _params("bf16"))
    (program,) = c.lowering.functions["step"].programs
    calls = c.lowering.calls.programs[program.symbol]
    assert not program.guard and len(calls.kernels) == 3 + 2 * 8 + 3
    assert sum(calls.barriers) <= len(calls.kernels) - 3  # the three gathers at the start need none between them


def test_kernels_that_share_queues_are_apart(build: Any) -> None:
    func = build(_text("bf16"), _params("bf16")).module.func("step")
    storage = Storage(func, DimScope())
    words = [storage.work_queues() for _ in range(17)]
    calls = [Call(None, (), (storage.barrier,), (word,), func.ops[0]) for word in words]
    assert barriers(calls, storage) == [False] * 8 + [True] + [False] * 7 + [True]
