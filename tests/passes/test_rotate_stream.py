"""rotate-stream on tiny models of several families: logits are those of transformers and of the module before, and so
are the tokens that are taken greedily. The matrix itself: orthogonal, the same on every machine, and it spreads."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.quant_eval.test_quant_eval import traced
from xllm_compiler.frontend.reference import load_reference, reference_logits, stepped_logits
from xllm_compiler.ir.clone import clone_module
from xllm_compiler.ir.hash import structural_hash
from xllm_compiler.ir.ops import Embedding, LayerNorm, Linear, LinearGlu, RmsNorm, Rotate
from xllm_compiler.ir.orthogonal import rotated
from xllm_compiler.models.random_checkpoint import TINY, write_random_checkpoint
from xllm_compiler.passes.base import PassContext
from xllm_compiler.passes.manager import run_pipeline

PROMPTS = [[7, 300, 12, 45, 9, 111, 64, 3, 280], [200, 5]]
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "qwen3, odd width": ("qwen3", {"hidden_size": 72, "head_dim": 16, "tie_word_embeddings": True}),
    "phi3": ("phi3", {"pad_token_id": 0}),
    "gpt_neox": ("gpt_neox", {"use_parallel_residual": True, "intermediate_size": 160}),
    "gpt2": ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}),
    "granite": ("granite", {"residual_multiplier": 0.22, "embedding_multiplier": 12.0}),
}
TIED = ("llama, tied", "qwen3, odd width", "gpt2")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_rotated_model_answers_as_before(name: str, tmp_path: Path) -> None:
    family, given = FAMILIES[name]
    path = write_random_checkpoint(family, tmp_path / "m", settings={**TINY, **given}, seed=3)
    module, weights = _traced(path)
    turned = clone_module(module)
    ctx = PassContext()
    run_pipeline("rotate-stream,fix(fold,cse,dce)", turned, ctx, verify_each=True)
    ops = list(turned.func("step").ops)
    assert ctx.stats["rotate-stream"]["streams"] == 1
    assert not any(isinstance(op, LayerNorm) for op in ops)
    assert all(op.w is None for op in ops if isinstance(op, RmsNorm) and op.x.tensor.rank == 2)
    tables = [op.w.op for op in ops if isinstance(op, Embedding) and op.w.dtype == "f32" and op.w.shape[0].value >= 384]
    assert tables and all(isinstance(table, Rotate) for table in tables)
    assert sum(isinstance(op.w.op, Rotate) for op in ops if isinstance(op, (Linear, LinearGlu))) >= 9
    assert any("2 weights" in remark.text for remark in ctx.remarks) == (name in TIED)

    model = load_reference(path)
    before, after = (stepped_logits(m, weights, PROMPTS) for m in (module, turned))
    for prompt, plain, got in zip(PROMPTS, before, after, strict=True):
        want = reference_logits(model, prompt)
        scale = np.abs(want).max()
        assert np.abs(got - want).max() < 2e-5 * scale
        assert np.abs(got - plain).max() < 2e-5 * scale
        assert (got.argmax(1) == want.argmax(1)).all()


def test_a_post_norm_stays_and_is_named(tmp_path: Path) -> None:
    path = write_random_checkpoint("gemma2", tmp_path / "m", settings={**TINY, "head_dim": 16}, seed=3)
    module, _ = _traced(path)
    before = structural_hash(module)
    ctx = PassContext()
    run_pipeline("rotate-stream", module, ctx)
    assert structural_hash(module) == before
    (remark,) = ctx.remarks
    assert "is a norm that writes to it" in remark.text and "3 more ops" in remark.text
    assert "post_attention_layernorm" in remark.where and "layers.0" in remark.where


def _traced(path: Path) -> tuple[Any, Any]:
    got = traced(path)
    return got.module, got.weights


@settings(deadline=None, max_examples=40)
@given(
    width=st.sampled_from((1, 2, 3, 9, 16, 45, 48, 576)),
    count=st.integers(0, 300),
    axis=st.sampled_from((0, 1)),
    scaled=st.booleans(),
    centre=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_weight_is_multiplied_by_one_orthogonal_matrix(
    width: int, count: int, axis: int, scaled: bool, centre: bool, seed: int
) -> None:
    q = rotated(np.eye(width), 1, np.float64)
    assert np.allclose(q @ q.T, np.eye(width), atol=1e-12)
    draw = np.random.default_rng(seed)
    v, scale = draw.standard_normal((count, width)), draw.standard_normal(width)
    want = v * (scale + 0.5) if scaled else v
    want = (want - want.mean(axis=1, keepdims=True) if centre else want) @ q
    w = v if axis else np.ascontiguousarray(v.T)
    for wide, near in ((np.float64, 1e-12), (np.float32, 1e-5)):
        got = rotated(w.astype(wide), axis, wide, scale.astype(wide) if scaled else None, 0.5 * scaled, centre)
        assert got.dtype == wide and got.flags.c_contiguous
        assert np.allclose(got if axis else got.T, want, atol=near * 10)
        if count:
            one = rotated(v[0].astype(wide), 0, wide, scale.astype(wide) if scaled else None, 0.5 * scaled, centre)
            same = got[0] if axis else got[:, 0]
            assert np.allclose(one, same, atol=1e-6) if centre else (one == same).all()


@pytest.mark.parametrize("width", [64, 576, 640, 896, 2560])
def test_it_spreads_what_is_large(width: int) -> None:
    """A single value, a constant vector, and a few values: none is larger afterwards than what is usual."""
    draw = np.random.default_rng(0)
    few = np.zeros(width)
    few[draw.integers(0, width, 3)] = 1
    for v in (np.eye(width)[5], np.ones(width), few):
        got = rotated(v, 0, np.float64)
        assert np.abs(got).max() / np.sqrt(np.square(got).mean()) < 6


def test_the_matrix_is_the_same_everywhere() -> None:
    signs = np.sign(rotated(np.eye(96), 1, np.float64)[:, 0]).astype(np.int8)
    assert hashlib.sha256(signs.tobytes()).hexdigest()[:16] == "92aa2edd00639d36"
