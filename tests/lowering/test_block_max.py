"""Block maxima of the logits, found by the projection itself or by a kernel of their own, against numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from xllm_compiler.errors import XllmError

VOCAB = 200
LAYERS = {
    "f32": ("f32", "%logits = nn.linear(%rows, %w) : f32[S, 200]"),
    "bf16": ("bf16", "%y = nn.linear(%rows, %w) : bf16[S, 200]\n  %logits = t.cast(%y, dtype=f32) : f32[S, 200]"),
    "biased": (
        "bf16",
        '%b = param(name="b") : bf16[200]\n  %y = nn.linear(%rows, %w, bias=%b) : bf16[S, 200]\n'
        "  %logits = t.cast(%y, dtype=f32) : f32[S, 200]",
    ),
    "capped": (
        "f32",
        "%y = nn.linear(%rows, %w) : f32[S, 200]\n  %c = t.const(value=-2.0) : f32[]\n  %h = t.tanh(%y) : f32[S, 200]\n"
        "  %logits = t.mul(%h, %c) : f32[S, 200]",
    ),
    "activated": ("f32", "%logits = nn.linear(%rows, %w, act=silu) : f32[S, 200]"),
}
FUSED = {"f32", "bf16", "biased"}


def text(dtype: str, body: str, block: int = 64) -> str:
    return f"""func @step(%ids: i32[N], %sel: i32[S]) -> (f32[S, 200], f32[S, {-(-VOCAB // block)}]) {{
  %e = param(name="e") : {dtype}[50, 24]
  %w = param(name="w") : {dtype}[200, 24]
  %h0 = nn.embedding(%ids, %e) : {dtype}[N, 24]
  %rows = t.take(%h0, %sel, axis=0) : {dtype}[S, 24]
  {body}
  %m = nn.block_max(%logits, block={block}) : f32[S, {-(-VOCAB // block)}]
  return %logits, %m
}}"""


def params(dtype: str) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = {"e": (50, 24), "w": (200, 24), "b": (200,)}
    kind = ml_dtypes.bfloat16 if dtype == "bf16" else np.float32
    made = {name: rng.standard_normal(shape).astype(kind) for name, shape in shapes.items()}
    made["e"][7] = 3e38  # sums of infinities: a row of NaN, or nearly
    return made


@pytest.mark.parametrize("name", LAYERS)
def test_maxima_are_those_of_the_logits(build: Callable[..., Any], name: str) -> None:
    dtype, body = LAYERS[name]
    compiled = build(text(dtype, body), params(dtype))
    assert compiled.lowering.logits.evaluate({"S": 3}) == 3 * (VOCAB + 4) * 4
    ids = np.array([3, 7, 9, 20, 49, 0, 1, 2, 11], np.int32)
    for rows in ([0, 1, 2, 3, 4, 5, 6, 7, 8], [4], []):
        sel = np.array(rows, np.int32)
        for team in (1, 2):
            for program in ("prefill", "decode"):
                dims = {"N": len(ids), "S": len(sel)}
                isa = compiled.lowering.isas[-1]
                logits, _ = compiled.step({"ids": ids, "sel": sel}, dims, isa, team, program)
                if rows:
                    want = np.stack([logits[:, at : at + 64].max(axis=1) for at in range(0, VOCAB, 64)], axis=1)
                    np.testing.assert_array_equal(compiled.maxima, want)
                    close = {"rtol": 2e-2, "atol": 5e-2} if dtype == "bf16" else {"rtol": 1e-4, "atol": 1e-4}
                    reference = compiled.reference({"ids": ids, "sel": sel}, dims)
                    sound = ids[sel] != 7
                    np.testing.assert_allclose(logits[sound], reference[sound], **close)
                    assert name == "capped" or not np.isfinite(logits[~sound]).all(axis=1).any()


@pytest.mark.parametrize("name", LAYERS)
def test_the_projection_finds_them_where_it_writes_the_logits(build: Callable[..., Any], name: str) -> None:
    from xllm_compiler.lowering.cpu.select_kernels import select
    from xllm_compiler.lowering.weights import WeightTable

    dtype, body = LAYERS[name]
    calls = select(build(text(dtype, body), params(dtype)).module.func("step"), WeightTable()).calls
    names = [type(call.kernel).__name__ for call in calls]
    assert ("LinearBlockMax" in names, "BlockMax" in names) == (name in FUSED, name not in FUSED)


def test_other_blocks_have_no_kernel(build: Callable[..., Any]) -> None:
    with pytest.raises(XllmError, match="in blocks of 32, not 64"):
        build(text("f32", LAYERS["f32"][1], block=32), params("f32"))


def test_two_tensors_that_are_no_maxima_are_refused(build: Callable[..., Any]) -> None:
    two = text("f32", LAYERS["f32"][1]).replace("return %logits, %m", "return %m, %logits")
    two = two.replace("(f32[S, 200], f32[S, 4])", "(f32[S, 4], f32[S, 200])")
    with pytest.raises(XllmError, match="returns 2 tensors"):
        build(two, params("f32"))
