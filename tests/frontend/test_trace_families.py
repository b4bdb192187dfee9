"""Traced models against transformers: the same logits, for requests side by side and in chunks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.frontend.conftest import Make
from xllm_compiler.frontend.checkpoint import Checkpoint
from xllm_compiler.frontend.reference import load_reference, reference_logits, stepped_logits
from xllm_compiler.frontend.trace import trace_checkpoint
from xllm_compiler.ir.hash import structural_hash
from xllm_compiler.ir.ops import KvAttend
from xllm_compiler.ir.parser import parse_module
from xllm_compiler.ir.printer import print_module
from xllm_compiler.ir.verify import verify
from xllm_compiler.passes.base import PassContext
from xllm_compiler.passes.manager import run_pipeline

CANONICAL = "import-clean,fold,cse,canonicalise,tabulate-positions,fix(fold,cse,dce)"

# family -> settings, and the ops that canonicalising must find (and must not leave)
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "qwen2": ({}, {"nn.rms_norm": 5, "nn.rope": 4, "t.sin": 1}),
    "qwen3": ({"head_dim": 16}, {"nn.rms_norm": 9, "nn.rope": 4}),
    "llama": ({}, {"nn.rms_norm": 5, "nn.rope": 4, "t.slice": 0, "t.transpose": 0}),
    "mistral": ({"sliding_window": 8}, {"nn.rms_norm": 5, "nn.rope": 4}),
    "phi3": ({"sliding_window": 8}, {"nn.rms_norm": 5, "nn.rope": 4}),
    "olmo2": ({}, {"nn.rms_norm": 9, "nn.rope": 4}),
    "gemma2": ({"head_dim": 16, "sliding_window": 8}, {"nn.rms_norm": 9, "nn.rope": 4}),
    "gemma3_text": ({"head_dim": 16, "sliding_window": 8}, {"nn.rope": 4}),
    "glm4": ({"head_dim": 16}, {"nn.rms_norm": 9, "nn.rope": 4}),
    "cohere": ({}, {"nn.layer_norm": 3, "nn.rope": 4}),
    "stablelm": ({}, {"nn.layer_norm": 5, "nn.rope": 4}),
    "starcoder2": ({"sliding_window": 8}, {"nn.layer_norm": 5, "nn.rope": 4, "t.gelu": 2}),
    "gpt_neox": ({}, {"nn.layer_norm": 5, "nn.rope": 4, "t.concat": 0}),
    "gpt2": ({}, {"nn.layer_norm": 5, "t.gelu": 2, "t.pow": 0}),
    "granite": ({}, {"nn.rms_norm": 5, "nn.rope": 4}),
    "smollm3": ({}, {"nn.rms_norm": 5}),
    "phi": ({}, {"nn.layer_norm": 3, "nn.rope": 4}),
    "granite_swa": ({"sliding_window": 8}, {"nn.rms_norm": 5}),  # attention sinks
    "opt": ({"ffn_dim": 96, "word_embed_proj_dim": 64}, {"nn.layer_norm": 5, "t.cumsum": 0}),  # positions from a mask
    "minicpm3": (
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
        },
        {"kv.attend": 2},
    ),  # latent attention, written into its parts in place
}
# Those that show nothing to the importer and the passes that the others do not show.
MANY = (
    "glm4",
    "stablelm",
    "granite",
    "smollm3",
    "phi",
    "olmo2",
    "starcoder2",
    "cohere",
    "opt",
    "minicpm3",
    "gemma3_text",
)


def prompts(vocab: int) -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(3, vocab, n).tolist() for n in (19, 1, 8, 33)]


def counts(module: Any) -> dict[str, int]:
    out: dict[str, int] = {}
    for op in module.func("step").ops:
        out[op.name] = out.get(op.name, 0) + 1
    return out


@pytest.mark.parametrize("family", [pytest.param(f, marks=pytest.mark.slow) if f in MANY else f for f in FAMILIES])
def test_same_logits_as_transformers(family: str, make: Make, limits: dict[str, Any]) -> None:
    settings, found = FAMILIES[family]
    path = make(family, **settings)
    traced = trace_checkpoint(Checkpoint.open(path), **limits)
    verify(traced.module)
    weights = dict(traced.weights)
    model = load_reference(path)
    ids = prompts(traced.info.vocab_size)
    theirs = [reference_logits(model, p) for p in ids]
    if family in ("llama", "gpt2"):  # as imported too: the passes may not hide what the importer did
        for a, b in zip(stepped_logits(traced.module, weights, ids), theirs, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)
    run_pipeline(CANONICAL, traced.module, PassContext())
    for a, b in zip(stepped_logits(traced.module, weights, ids), theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    have = counts(traced.module)
    assert {name: have.get(name, 0) for name in found} == found
    window = settings.get("sliding_window", 0)
    windows = {op.window for op in traced.module.func("step").ops if isinstance(op, KvAttend)}
    assert windows <= {0, window} and (not window or window in windows)


def test_module_is_what_the_contract_says(make: Make, limits: dict[str, Any]) -> None:
    path = make("qwen3", head_dim=16, tie_word_embeddings=True)
    traced = trace_checkpoint(Checkpoint.open(path), **limits)
    step = traced.module.func("step")
    assert [f"{a.name}: {a.type}" for a in step.args] == [
        "ids: i32[N]",
        "pos: i32[N]",
        "seq: i32[N]",
        "start: i32[B + 1]",
        "table: i32[B, 4]",
        "sel: i32[S]",
        "kv0: kv<f32, heads=2, k=16, v=16, page=16>[P]",
        "kv1: kv<f32, heads=2, k=16, v=16, page=16>[P]",
    ]
    assert str(step.returns[0].type) == "f32[S, 384]"
    assert {i: a.name for i, a in step.aliases.items()} == {1: "kv0", 2: "kv1"}
    bounds = {n: (s.lo, s.hi) for n, s in traced.module.scope.symbols.items()}
    assert bounds == {"N": (1, 128), "B": (1, 8), "S": (0, 64), "P": (1, 1 << 24)}
    assert traced.info.layers == 2 and traced.info.eos_token_ids == (2, 0) and traced.info.bos_token_id is None
    # Tied embeddings are one parameter under the checkpoint's name, and every op knows where it came from.
    names = [op.attrs["name"] for op in step.ops if op.name == "param"]
    assert len(names) == len(set(names)) and "lm_head.weight" not in names
    attend = next(op for op in step.ops if op.name == "kv.attend")
    assert attend.loc.module_path == "model.layers.0.self_attn" and attend.loc.file.startswith(
        "transformers/models/qwen3"
    )
    text = print_module(traced.module)
    assert structural_hash(parse_module(text, "t")) == structural_hash(traced.module)


def test_two_traces_are_the_same_text(make: Make, limits: dict[str, Any]) -> None:
    path = make("llama")
    assert print_module(trace_checkpoint(Checkpoint.open(path), **limits).module) == print_module(
        trace_checkpoint(Checkpoint.open(path), **limits).module
    )


def test_bf16_keeps_f32_tables_and_is_close(make: Make, limits: dict[str, Any]) -> None:
    path = make("llama", dtype="bfloat16")
    traced = trace_checkpoint(Checkpoint.open(path), **{**limits, "dtype": "bf16"})
    run_pipeline(CANONICAL, traced.module, PassContext())
    ropes = [op for op in traced.module.func("step").ops if op.name == "nn.rope"]
    assert len(ropes) == 4 and {op.operands[1].dtype for op in ropes} == {"f32"}
    assert {op.operands[0].dtype for op in ropes} == {"bf16"}
    ids = prompts(traced.info.vocab_size)
    exact = load_reference(path, "f32")
    for a, p in zip(stepped_logits(traced.module, dict(traced.weights), ids), ids, strict=True):
        b = reference_logits(exact, p)
        assert np.abs(a - b).max() < 0.03 * np.abs(b).max()
        assert np.mean(a.argmax(-1) == b.argmax(-1)) > 0.8


def test_no_memory_for_weights() -> None:
    """A 70B-sized config is traced (one layer's worth of graph) without its weights ever existing."""
    import resource

    from transformers import AutoConfig

    config = AutoConfig.for_model(
        "llama",
        hidden_size=8192,
        intermediate_size=28672,
        num_attention_heads=64,
        num_key_value_heads=8,
        num_hidden_layers=2,
        vocab_size=128256,
        max_position_embeddings=8192,
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    traced = trace_checkpoint(config, dtype="bf16", max_num_seqs=8, max_num_batched_tokens=512, max_num_logits=8)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 600, f"{grown} MB"  # the two embeddings alone would be 8.4 GB in f32
    assert traced.info.max_model_len == 8192
