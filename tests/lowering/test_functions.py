"""Several functions in one library: their own inputs and outputs of any type, one file of weights, shared KV pages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from xllm_compiler.artifact import FORMAT, DimRange, Limits, Manifest, Model, Target, Weight, Weights
from xllm_compiler.artifact.rules import validate
from xllm_compiler.errors import XllmError
from xllm_compiler.interp import run
from xllm_compiler.runtime.cpu import CpuExecutor
from xllm_compiler.runtime.cpu.team import load_library
from xllm_compiler.step.inputs import StepBatch, StepWriter

HIDDEN, VOCAB, TABLE, PAGES = 32, 96, 4, 12
KV = "kv<f32, heads=1, k=16, v=16, page=16>[P]"
ARGS = (
    f"%ids: i32[N], %pos: i32[N], %seq: i32[N], %start: i32[B + 1], %table: i32[B, {TABLE}], %sel: i32[S], %kv0: {KV}"
)
BODY = f"""
  %w = param(name="w") : f32[{VOCAB}, {HIDDEN}]
  %wq = param(name="wq") : f32[32, {HIDDEN}]
  %wk = param(name="wk") : f32[16, {HIDDEN}]
  %h0 = nn.embedding(%ids, %w) : f32[N, {HIDDEN}]
  %q0 = nn.linear(%h0, %wq) : f32[N, 32]
  %q = t.reshape(%q0, shape=[N, 2, 16]) : f32[N, 2, 16]
  %k0 = nn.linear(%h0, %wk) : f32[N, 16]
  %k = t.reshape(%k0, shape=[N, 1, 16]) : f32[N, 1, 16]
  %new = kv.write(%kv0, %k, %k, %pos, %seq, %table) : {KV}
  %a = kv.attend(%new, %q, %pos, %seq, %start, %table, scale=0.25) : f32[N, 2, 16]
  %h1 = t.reshape(%a, shape=[N, 32]) : f32[N, 32]
  %last = t.take(%h1, %sel, axis=0) : f32[S, {HIDDEN}]"""
TEXT = f"""
func @step({ARGS}) -> (logits: f32[S, {VOCAB}], {KV} alias %kv0) {{{BODY}
  %logits = nn.linear(%last, %w) : f32[S, {VOCAB}]
  return %logits, %new
}}

func @hidden({ARGS}) -> (hidden: f32[S, {HIDDEN}], {KV} alias %kv0) {{{BODY}
  %one = t.const(value=1.0) : f32[]
  %hidden = t.add(%last, %one) : f32[S, {HIDDEN}]
  return %hidden, %new
}}
"""


def _params() -> dict[str, Any]:
    rng = np.random.default_rng(3)
    shapes = {"w": (VOCAB, HIDDEN), "wq": (32, HIDDEN), "wk": (16, HIDDEN)}
    return {name: rng.standard_normal(shape).astype(np.float32) / 4 for name, shape in shapes.items()}


def _manifest(c: Any) -> Manifest:
    tensors = tuple(Weight(t.name, t.layout, t.dtype, t.shape, t.offset, t.bytes) for t in c.lowering.weights)
    return Manifest(
        format=FORMAT,
        id="",
        model=Model("Toy", "toy", VOCAB, HIDDEN, 1, "f32", TABLE * 16, (), None, None),
        target=Target("cpu", c.lowering.isas, ()),
        limits=Limits(64, 512, 64),
        dims={s.name: DimRange(s.lo, s.hi, s.why) for s in c.module.scope.symbols.values()},
        states=c.lowering.states,
        functions=c.lowering.functions,
        weights=Weights(c.lowering.weight_bytes, tensors),
        files={},
        key={},
    )


@contextmanager
def _executor(c: Any) -> Iterator[CpuExecutor]:
    library = load_library(c.folder / "cpu" / f"{c.lowering.isas[0]}.so")
    weights = np.memmap(c.folder / "weights.bin", np.uint8, "r")
    executor = CpuExecutor(_manifest(c), library, weights, pages=PAGES, threads=2)
    try:
        yield executor
    finally:
        executor.close()


def _write(batch: StepBatch, chunks: list[tuple[int, int, int]]) -> StepBatch:
    """(request, position, tokens) each; the last row of every request is wanted."""
    writer = StepWriter(batch)
    writer.begin()
    for request, at, count in chunks:
        tokens = [(7 * request + 3 * p + 1) % VOCAB for p in range(at, at + count)]
        pages = np.arange(TABLE, dtype=np.int32)[::-1] + TABLE * request
        writer.add(tokens, at, pages, [count - 1])
    return writer.end()


@pytest.mark.parametrize("page", [16, 48])
def test_two_functions_share_weights_and_pages(build: Any, page: int) -> None:
    """What @hidden has cached, @step reads, in the interpreter and in compiled code alike."""
    c = build(TEXT.replace("page=16", f"page={page}"), _params())
    with _executor(c) as executor:
        batches = {name: executor.new_batch(name) for name in ("step", "hidden")}
        cache = np.zeros((PAGES * page, 1, 32), np.float32)
        for name, chunks in [
            ("hidden", [(0, 0, 18), (1, 0, 3)]),
            ("step", [(1, 3, 1), (0, 18, 5)]),
            ("hidden", [(0, 23, 1), (2, 0, 33)]),
            ("step", [(0, 24, 1), (1, 4, 1), (2, 33, 1)]),
        ]:
            batch = _write(batches[name], chunks)
            got = executor.execute(batch)
            sizes = {**batch.sizes, "P": PAGES}
            want, cache = run(c.module, name, {**batch.inputs(), "kv0": cache}, _params(), sizes)
            assert list(got) == [{"step": "logits", "hidden": "hidden"}[name]]
            np.testing.assert_allclose(next(iter(got.values())), want, rtol=2e-5, atol=2e-5)


def test_a_function_that_is_not_there(build: Any) -> None:
    with _executor(build(TEXT, _params())) as executor, pytest.raises(XllmError, match="no function @draft; there is"):
        executor.new_batch("draft")


def test_pages_that_no_kernel_has(build: Any) -> None:
    with pytest.raises(XllmError, match="blocks of 24 tokens; a CPU kernel has tiles of 16"):
        build(TEXT.replace("page=16", "page=24"), _params())


def test_what_is_shared_is_there_once(build: Any) -> None:
    both = build(TEXT, _params())
    alone = build(TEXT[: TEXT.index("func @hidden")], _params())
    assert [w.name for w in both.lowering.weights] == [w.name for w in alone.lowering.weights]
    assert list(both.lowering.states) == ["kv0"] and both.lowering.functions["step"] == alone.lowering.functions["step"]
    symbols = [c.symbol for c in both.lowering.calls.kernels]
    assert len(both.lowering.calls.programs) == 2 and len(symbols) < sum(
        len(set(p.kernels)) for p in both.lowering.calls.programs.values()
    )


def test_a_manifest_of_two_functions_is_sound_and_its_arena_the_larger(build: Any) -> None:
    manifest = _manifest(build(TEXT, _params()))
    with pytest.raises(XllmError, match=r"module\.xir is not listed"):  # all but the files
        validate(manifest)
    sizes = manifest.limit_values(PAGES)
    arenas = [function.arena_bytes(sizes) for function in manifest.functions.values()]
    assert manifest.arena_bytes(sizes) == max(arenas) > 0
    assert manifest.output_bytes(sizes) == 64 * 4 * (VOCAB + HIDDEN)


def test_a_name_means_one_state(build: Any) -> None:
    head, tail = TEXT.split("func @hidden")
    other = head + "func @hidden" + tail.replace("kv0", "kv1")
    assert list(build(other, _params()).lowering.states) == ["kv0", "kv1"]
    clash = head + "func @hidden" + tail.replace("[P]", "[B]")
    with pytest.raises(XllmError, match="kv0"):
        build(clash, _params())


def test_inputs_and_outputs_of_any_type(build: Any) -> None:
    text = """func @mix(%x: bf16[N, 24], %ids: i32[N], %scale: f32[1, 24])
      -> (wide: f32[N, 24], narrow: bf16[N, 24], next: i32[N]) {
  %f = t.cast(%x, dtype=f32) : f32[N, 24]
  %wide = t.mul(%f, %scale) : f32[N, 24]
  %y = t.add(%wide, %f) : f32[N, 24]
  %narrow = t.cast(%y, dtype=bf16) : bf16[N, 24]
  %one = t.const(value=1, dtype=i32) : i32[]
  %next = t.add(%ids, %one) : i32[N]
  return %wide, %narrow, %next
}"""
    c = build(text, {})
    rng = np.random.default_rng(0)
    inputs = {
        "x": rng.standard_normal((5, 24)).astype(ml_dtypes.bfloat16),
        "ids": np.arange(5, dtype=np.int32),
        "scale": rng.standard_normal((1, 24)).astype(np.float32),
    }
    c.step(inputs, {"N": 5}, c.lowering.isas[0], 2, function="mix")
    for got, want in zip(c.outputs.values(), run(c.module, "mix", inputs, {}, {"N": 5}), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)
