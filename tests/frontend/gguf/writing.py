"""GGUF files for tests, made with llama.cpp's own package from random checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from safetensors.numpy import load_file

from xllm_compiler.models.random_checkpoint import write_random_checkpoint

Array = np.ndarray[Any, np.dtype[Any]]

SIZES: dict[str, Any] = {
    "hidden_size": 256,  # rows of whole K-quant blocks
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 288,
    "max_position_embeddings": 128,
}

# Head sizes as transformers assumes them of a GGUF file, since it does not read them for every architecture.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": True, "rope_theta": 50000.0}),
    "mistral": ("llama", {}),
    "qwen2": ("qwen2", {"rope_theta": 1e6}),
    "qwen3": ("qwen3", {"head_dim": 128, "tie_word_embeddings": True}),
    "gemma2": ("gemma2", {"head_dim": 256, "query_pre_attn_scalar": 256}),
    "gemma3_text": ("gemma3", {"head_dim": 256, "query_pre_attn_scalar": 256, "num_hidden_layers": 6}),
    "phi3": ("phi3", {"num_key_value_heads": 4, "pad_token_id": 0}),
}
"""transformers' family -> llama.cpp's architecture, and settings on top of SIZES."""


def blocks(kind: Kind, values: Array, rng: np.random.Generator) -> Array:
    """A weight as blocks. The package cannot round to K-quants: those are random blocks, with small scales."""
    if kind not in (Kind.Q4_K, Kind.Q5_K, Kind.Q6_K):
        return gguf.quantize(values.astype(np.float32), kind)
    size, nbytes = gguf.GGML_QUANT_SIZES[kind]
    found = rng.integers(0, 256, (values.size // size, nbytes), dtype=np.uint8)
    wide = {Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2), Kind.Q6_K: (208,)}[kind]
    for at in wide:
        small = rng.uniform(1e-5, 3e-5, (len(found), 1)).astype(np.float16)
        found[:, at : at + 2] = small.view(np.uint8)
    return found.reshape(*values.shape[:-1], -1)


def pairs(values: Array, heads: int) -> Array:
    """What convert_hf_to_gguf.py does to q and k of Llama (LlamaModel.permute)."""
    return (
        values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
    )


def random_gguf(
    family: str, folder: Path, kinds: Sequence[Kind], settings: Mapping[str, Any] | None = None, **keys: Any
) -> Path:
    """A random model of a family, whose matrices have `kinds` in turn; `keys`: more of its architecture's metadata, or
    other values of it."""
    architecture, own = FAMILIES[family]
    sizes = {**SIZES, **own, **(settings or {})}
    source = write_random_checkpoint(family, folder / "source", settings=sizes, tokenizer=False)
    path = folder / f"{family}.gguf"
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name(f"Random {family}")  # transformers stumbles over the name "mistral" itself
    writer.add_pad_token_id(0)
    layers, heads = sizes["num_hidden_layers"], sizes["num_attention_heads"]
    size = sizes.get("head_dim", sizes["hidden_size"] // heads)
    metadata: dict[str, Any] = {
        "block_count": layers,
        "context_length": sizes["max_position_embeddings"],
        "embedding_length": sizes["hidden_size"],
        "feed_forward_length": sizes["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": sizes["num_key_value_heads"],
        "attention.key_length": size,
        "attention.value_length": size,
        "rope.dimension_count": size,
        "vocab_size": sizes["vocab_size"],
        "attention.layer_norm_rms_epsilon": 1e-6 if "gemma" in family or "qwen" in family else 1e-5,
        "rope.freq_base": float(sizes.get("rope_theta", 1e6 if family == "gemma3_text" else 1e4)),
        **keys,
    }
    for key, value in metadata.items():
        add = {float: writer.add_float32, int: writer.add_uint32, str: writer.add_string}
        add[type(value)](f"{architecture}.{key}", value)
    names = gguf.get_tensor_name_map(
        next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), layers
    )
    rng = np.random.default_rng(1)
    matrices = 0
    for name, values in sorted(load_file(source / "model.safetensors").items()):
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found is not None, name
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            values = pairs(values, heads if "q_proj" in name else sizes["num_key_value_heads"])
        if "gemma" in family and name.endswith("norm.weight"):
            values = values + 1
        if values.ndim == 1:
            writer.add_tensor(found, values.astype(np.float32))
            continue
        kind = kinds[matrices % len(kinds)]
        matrices += 1
        if kind in (Kind.F32, Kind.F16):
            writer.add_tensor(found, values.astype(np.float32 if kind == Kind.F32 else np.float16))
        else:
            writer.add_tensor(found, blocks(kind, values, rng), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
