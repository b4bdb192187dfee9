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
    assert compiled.lowering.functions["step"].output_bytes({"S": 3}) == 3 * (VOCAB + 4) * 4
    ids = np.array([3, 7, 9, 20, 49, 0, 1, 2, 11], np.int32)
    for rows in ([0, 1, 2, 3, 4, 5, 6, 7, 8], [4], []):
        sel = np.array(rows, np.int32)
        for team in (1, 2):
            dims = {"N": len(ids), "S": len(sel)}
            isa = compiled.lowering.isas[-1]
            logits, _ = compiled.step({"ids": ids, "sel": sel}, dims, isa, team)
            if rows:
                want = np.stack([logits[:, at : at + 64].max(axis=1) for at in range(0, VOCAB, 64)], axis=1)
                np.testing.assert_array_equal(compiled.outputs["out1"], want)
                close = {"rtol": 2e-2, "atol": 5e-2} if dtype == "bf16" else {"rtol": 1e-4, "atol": 1e-4}
                reference = compiled.reference({"ids": ids, "sel": sel}, dims)
                sound = ids[sel] != 7
                np.testing.assert_allclose(logits[sound], reference[sound], **close)
                assert name == "capped" or not np.isfinite(logits[~sound]).all(axis=1).any()


@pytest.mark.parametrize("name", LAYERS)
def test_the_projection_finds_them_where_it_writes_the_logits(build: Callable[..., Any], name: str) -> None:
    from xllm_compiler.lowering.cpu.select_kernels import select
    from xllm_compiler.lowering.weight_requests import WeightTable

    dtype, body = LAYERS[name]
    calls = select(build(text(dtype, body), params(dtype)).module.func("step"), WeightTable()).calls
    names = [type(call.kernel).__name__ for call in calls]
    assert ("LinearBlockMax" in names, "BlockMax" in names) == (name in FUSED, name not in FUSED)


def test_other_blocks_have_no_kernel(build: Callable[..., Any]) -> None:
    with pytest.raises(XllmError, match="in blocks of 32, not 64"):
        build(text("f32", LAYERS["f32"][1], block=32), params("f32"))


def test_outputs_of_any_order_number_and_name(build: Callable[..., Any]) -> None:
    body = text("f32", LAYERS["f32"][1])
    three = body.replace("return %logits, %m", "return %m, %rows, %logits")
    three = three.replace("(f32[S, 200], f32[S, 4])", "(f32[S, 4], picked: f32[S, 24], logits: f32[S, 200])")
    inputs = {"ids": np.array([3, 9, 20], np.int32), "sel": np.array([2, 0], np.int32)}
    dims = {"N": 3, "S": 2}
    two = build(body, params("f32"))
    logits, _ = two.step(inputs, dims, two.lowering.isas[-1])
    compiled = build(three, params("f32"))
    maxima, _ = compiled.step(inputs, dims, compiled.lowering.isas[-1])
    assert list(compiled.outputs) == ["out0", "picked", "logits"]
    np.testing.assert_array_equal(compiled.outputs["logits"], logits)
    np.testing.assert_array_equal(maxima, two.outputs["out1"])
    np.testing.assert_array_equal(compiled.outputs["picked"], params("f32")["e"][[20, 3]])


@pytest.mark.parametrize(("returned", "match"), [("%logits, %logits", "twice"), ("%logits, %w", "does not compute")])
def test_outputs_that_nothing_writes_are_refused(build: Callable[..., Any], returned: str, match: str) -> None:
    shape = "f32[S, 200]" if match == "twice" else "f32[200, 24]"
    wrong = text("f32", LAYERS["f32"][1]).replace("return %logits, %m", f"return {returned}")
    with pytest.raises(XllmError, match=match):
        build(wrong.replace("(f32[S, 200], f32[S, 4])", f"(f32[S, 200], {shape})"), params("f32"))
