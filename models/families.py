"""Tiny configs of every causal-LM family of transformers: small, with no special path of the model left out.

Owns the sizes; who traces them (coverage, the corpus) decides what for. Must not know how checkpoints are compiled.
"""

from __future__ import annotations

from typing import Any

from xllm_compiler.models.random_checkpoint import TINY, random_config

# Set where a family's config has the field, so that every family is small and no special path is left out.
SMALL: dict[str, Any] = {
    **TINY,
    "max_position_embeddings": 128,
    "head_dim": 16,
    "sliding_window": 12,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "pad_token_id": 0,
    "ffn_dim": 160,
    "d_model": 64,
    "decoder_layers": 2,
    "encoder_layers": 2,
    "decoder_ffn_dim": 160,
    "encoder_ffn_dim": 160,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "embedding_size": 64,
    "word_embed_proj_dim": 64,
}
# What else a family needs at this size.
FAMILY: dict[str, dict[str, Any]] = {
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        **{f"{part}_config": {**TINY, "num_hidden_layers": 1} for part in ("encoder", "decoder", "global", "patcher")},
    },
    "mamba2": {"hidden_size": 64, "num_heads": 8, "head_dim": 16, "expand": 2},
    "xlnet": {"d_head": 16, "d_model": 64, "n_head": 4},
    "zaya": {"num_experts_per_tok": 1},
    "gemma4_text": {"vocab_size_per_layer_input": 384, "hidden_size_per_layer_input": 16},
    "roc_bert": {"shape_vocab_size": 384, "shape_embed_dim": 32, "pronunciation_vocab_size": 384},
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "cwm": {"bos_token_id": 1},
    "modernbert-decoder": {"bos_token_id": 1},
    "gpt_neo": {"num_hidden_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    "smollm3": {"num_hidden_layers": 2, "no_rope_layers": [1, 0]},
    "cohere_compass_text": {"num_hidden_layers": 2, "layer_types": ["full_attention", "full_attention"]},
    "lfm2_moe": {"num_hidden_layers": 2, "layer_types": ["full_attention", "conv"]},
    "lfm2": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    # With a padding token transformers 5.23 zeroes its row after loading the checkpoint, embeddings tied or not.
    "youtu": {"num_key_value_heads": 4, "pad_token_id": None},
    "minicpm3": {"num_key_value_heads": 4},
    "glm4_moe_lite": {"num_key_value_heads": 4},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "routed_scaling_factor": 1.0},
    "deepseek_v2": {"num_key_value_heads": 4},
    "deepseek_v3": {"num_key_value_heads": 4},
    "axk1": {"num_key_value_heads": 4},
}

# Fields of SMALL that a family's config has and does not let itself be set to.
WITHOUT: dict[str, tuple[str, ...]] = {
    "prophetnet": ("num_hidden_layers",),
    "xlnet": ("max_position_embeddings",),
    "zamba": ("num_hidden_layers",),
    "zamba2": ("num_hidden_layers",),
}


def settable(config: Any, name: str) -> bool:
    """Whether a config has a plain field of that name."""
    try:
        getattr(config, name)
    except Exception:
        return False
    found = getattr(type(config), name, None)
    return not (isinstance(found, property) and found.fset is None)


def settings_of(family: str) -> dict[str, Any]:
    """The config fields for the tiny model of a family."""
    default = random_config(family, FAMILY.get(family, {}))
    names = {k: v for k, v in SMALL.items() if settable(default, k) and k not in WITHOUT.get(family, ())}
    if getattr(default, "sliding_window", None) is None:
        names.pop("sliding_window", None)
    kinds = getattr(default, "layer_types", None) or []
    if {"sliding_attention", "full_attention"} == set(kinds):
        names["layer_types"] = ["sliding_attention", "full_attention"]
    if getattr(default, "is_decoder", None) is False:
        names["is_decoder"] = True
    if getattr(default, "is_encoder_decoder", None) is True:
        names["is_encoder_decoder"] = False
        names["is_decoder"] = True
    return {**names, **FAMILY.get(family, {})}
