"""Which architectures of llama.cpp can be read: their tensors' names in transformers, and what its converter changed.

Sources: convert_hf_to_gguf.py and gguf-py's tensor_mapping.py in llama.cpp, modeling_gguf_pytorch_utils.py in
transformers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from xllm_compiler.errors import XllmError
from xllm_compiler.frontend.gguf.file import ARCHITECTURE, GgufFile, TensorInfo
from xllm_compiler.frontend.gguf.tensors import GgufEntry

ROPE_TABLES: Final = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that belong to the rotary embedding, which a config describes."""

_LAYER: Final = re.compile(r"blk\.(0|[1-9]\d{0,5})\.([a-z0-9_]+)\.(weight|bias)")
_OUTER: Final = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "output.bias": "lm_head.bias",
}
_ATTENTION: Final = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_MLP: Final = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_NORMS: Final = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_HEAD_NORMS: Final = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_SANDWICH: Final = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


@dataclass(frozen=True)
class Architecture:
    """One of them. `model_type` and `model_class` are transformers' names, `layer` maps the modules of a layer.
    `paired`: rows of q and k are in llama.cpp's order. `norms_added`: what norm weights are larger by than
    transformers'."""

    model_type: str
    model_class: str
    layer: Mapping[str, str]
    paired: bool = False
    norms_added: float = 0.0


_LLAMA: Final = Architecture("llama", "LlamaForCausalLM", {**_ATTENTION, **_MLP, **_NORMS}, paired=True)
MISTRAL: Final = replace(_LLAMA, model_type="mistral", model_class="MistralForCausalLM")
"""What an architecture "llama" with a sliding window is."""

ARCHITECTURES: Final[dict[str, Architecture]] = {
    "llama": _LLAMA,
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", {**_ATTENTION, **_MLP, **_NORMS}),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", {**_ATTENTION, **_MLP, **_NORMS, **_HEAD_NORMS}),
    "gemma2": Architecture("gemma2", "Gemma2ForCausalLM", {**_ATTENTION, **_MLP, **_SANDWICH}, norms_added=1.0),
    "gemma3": Architecture(
        "gemma3_text", "Gemma3ForCausalLM", {**_ATTENTION, **_MLP, **_SANDWICH, **_HEAD_NORMS}, norms_added=1.0
    ),
    "phi3": Architecture(
        "phi3",
        "Phi3ForCausalLM",
        {
            "attn_qkv": "self_attn.qkv_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_up": "mlp.gate_up_proj",
            "ffn_down": "mlp.down_proj",
            **_NORMS,
        },
    ),
}


def architecture_of(file: GgufFile) -> Architecture:
    """Raises XllmError("checkpoint" | "unsupported")."""
    name = file.metadata.get(ARCHITECTURE)
    if not isinstance(name, str):
        raise XllmError("checkpoint", f"{file.path.name} names no architecture", where=str(file.path))
    kind = file.metadata.get("general.type", "model")
    if kind != "model":
        raise XllmError(
            "unsupported",
            f"{file.path.name} is of the type {str(kind)[:40]!r}, not a model",
            where=str(file.path),
            help="merge an adapter into its model before converting it" if kind == "adapter" else "",
        )
    found = ARCHITECTURES.get(name)
    if found is None:
        raise XllmError(
            "unsupported",
            f"{file.path.name} is of the architecture {name[:40]!r}",
            where=str(file.path),
            help=f"of GGUF files can be read: {', '.join(ARCHITECTURES)}; or take the model's Hugging Face form",
        )
    return found


def entries_of(file: GgufFile, architecture: Architecture, config: Mapping[str, Any]) -> dict[str, GgufEntry]:
    """The model's tensors under transformers' names. `config` is what config.json would say. Raises
    XllmError("unsupported") for a tensor that no model of the architecture has."""
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    found = {}
    for info in file.tensors.values():
        if info.name in ROPE_TABLES:
            continue
        name, module = _name(file, architecture, info)
        if len(info.shape) > 2:
            raise _strange(file, info, f"has {len(info.shape)} axes")
        paired = heads.get(module, 0) if architecture.paired else 0
        if paired and info.shape[0] % (2 * paired):
            raise _strange(file, info, f"has {info.shape[0]} rows, which are not {paired} heads of pairs")
        added = architecture.norms_added if name.endswith("norm.weight") else 0.0
        entry = GgufEntry(name, info.type, info.shape, file.path, info.start, info.nbytes, paired, added)
        if entry.in_blocks and len(info.shape) != 2:
            raise _strange(file, info, f"is {info.type}, which only weights of linear layers and embeddings may be")
        found[name] = entry
    return found


def _name(file: GgufFile, architecture: Architecture, info: TensorInfo) -> tuple[str, str]:
    """transformers' name of a tensor, and llama.cpp's of its module in a layer."""
    if info.name in _OUTER:
        return _OUTER[info.name], ""
    parts = _LAYER.fullmatch(info.name)
    if parts is None or parts[2] not in architecture.layer:
        what = "is of a mixture of experts, which is not supported yet" if "_exp" in info.name else ""
        raise _strange(file, info, what or f"is no part of a model of the class {architecture.model_class}")
    return f"model.layers.{parts[1]}.{architecture.layer[parts[2]]}.{parts[3]}", parts[2]


def _strange(file: GgufFile, info: TensorInfo, what: str) -> XllmError:
    return XllmError("unsupported", f"tensor {info.name!r} {what}", where=f"{file.path}: {info.name}")
