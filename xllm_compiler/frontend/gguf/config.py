"""What the metadata of a GGUF file says of the model, as config.json and generation_config.json would say it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from xllm_compiler.errors import XllmError
from xllm_compiler.frontend.files import damaged
from xllm_compiler.frontend.gguf.architectures import MISTRAL, Architecture
from xllm_compiler.frontend.gguf.file import GgufFile
from xllm_compiler.frontend.gguf.keys import Keys
from xllm_compiler.frontend.gguf.rope import rope_of

_GEMMA_27B: Final = {"gemma2": 46, "gemma3": 62}
"""Layers of the models that scale queries by the hidden size, as llama.cpp tells them from the others."""

_ENDS: Final = ("eos_token_id", "eot_token_id", "eom_token_id")
_END_TEXTS: Final = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|eom_id|>")
_CONTROL: Final = 3  # of tokenizer.ggml.token_type


def config_of(file: GgufFile, architecture: Architecture) -> tuple[dict[str, Any], Architecture]:
    """config.json, and the architecture that the model has by it. Raises XllmError("checkpoint" | "unsupported")."""
    keys = Keys(file)
    if "token_embd.weight" not in file.tensors:
        raise damaged("tensor 'token_embd.weight' is missing", file.path)
    heads = keys.whole("attention.head_count")
    hidden = keys.whole("embedding_length")
    size = keys.whole("attention.key_length", max(1, hidden // heads))
    if keys.whole("attention.value_length", size) != size:
        raise XllmError("unsupported", "keys and values of a head differ in size", where=str(file.path))
    window = keys.whole("attention.sliding_window", 0)
    config: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": keys.whole("feed_forward_length"),
        "num_hidden_layers": keys.whole("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.whole("attention.head_count_kv", heads),
        "head_dim": size,
        "max_position_embeddings": keys.whole("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        **{f"{name}_token_id": _id(file, key) for name, key in _NAMED.items()},  # null, not the class's own default
    }
    if architecture.paired and window:
        architecture = MISTRAL
    rotated = keys.whole("rope.dimension_count", size)
    if rotated > size or (rotated != size and architecture.model_type != "phi3"):
        raise XllmError(
            "unsupported",
            f"{keys.prefix}rope.dimension_count is {rotated}, heads have {size} values",
            where=str(file.path),
        )
    config["rope_parameters"] = rope_of(file, keys, size, config["max_position_embeddings"])
    _OWN[architecture.model_type](config, keys, window)
    if rotated != size:
        config["rope_parameters"]["partial_rotary_factor"] = rotated / size
    keys.finish()
    return {
        "architectures": [architecture.model_class],
        "model_type": architecture.model_type,
        **config,
    }, architecture


_NAMED: Final = {"bos": "bos_token_id", "eos": "eos_token_id", "pad": "padding_token_id"}


def _id(file: GgufFile, key: str) -> int | None:
    value = file.metadata.get(f"tokenizer.ggml.{key}")
    if value is not None and type(value) is not int:
        raise damaged(f"tokenizer.ggml.{key} is {str(value)[:80]}, no token", file.path)
    return value


# ---- what each architecture has besides


def _llama(config: dict[str, Any], keys: Keys, window: int) -> None:
    config["attention_bias"] = "blk.0.attn_q.bias" in keys.file.tensors
    config["mlp_bias"] = "blk.0.ffn_gate.bias" in keys.file.tensors


def _mistral(config: dict[str, Any], keys: Keys, window: int) -> None:
    config["sliding_window"] = window


def _qwen2(config: dict[str, Any], keys: Keys, window: int) -> None:
    _no_window(keys, window)


def _qwen3(config: dict[str, Any], keys: Keys, window: int) -> None:
    _no_window(keys, window)
    config["attention_bias"] = "blk.0.attn_q.bias" in keys.file.tensors


def _gemma2(config: dict[str, Any], keys: Keys, window: int) -> None:
    config["sliding_window"] = window or 4096
    config["attn_logit_softcapping"] = keys.number("attn_logit_softcapping", 50.0) or None
    config["final_logit_softcapping"] = keys.number("final_logit_softcapping", 30.0) or None
    config["query_pre_attn_scalar"] = _query_scalar(config, "gemma2")


def _gemma3(config: dict[str, Any], keys: Keys, window: int) -> None:
    config["sliding_window"] = window or 1024
    config["sliding_window_pattern"] = keys.whole("attention.sliding_window_pattern", 6)
    config["final_logit_softcapping"] = keys.number("final_logit_softcapping", 0.0) or None
    config["query_pre_attn_scalar"] = _query_scalar(config, "gemma3")
    local = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base_swa", 10000.0)}
    config["rope_parameters"] = {"full_attention": config["rope_parameters"], "sliding_attention": local}


def _phi3(config: dict[str, Any], keys: Keys, window: int) -> None:
    config["sliding_window"] = window or None
    original = config["rope_parameters"].get("original_max_position_embeddings")
    if original is not None:  # the class has a default for it, which would win
        config["original_max_position_embeddings"] = original
    del config["head_dim"]  # the class computes it


_OWN: Final[dict[str, Callable[[dict[str, Any], Keys, int], None]]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "phi3": _phi3,
}


def _query_scalar(config: Mapping[str, Any], name: str) -> int:
    """What queries are divided by the root of: the size of a head. In models of 27B: the hidden size by heads."""
    if config["num_hidden_layers"] == _GEMMA_27B[name]:
        return int(config["hidden_size"]) // int(config["num_attention_heads"])
    return int(config["head_dim"])


def _no_window(keys: Keys, window: int) -> None:
    if window:
        raise XllmError("unsupported", f"{keys.prefix}attention.sliding_window is {window}", where=str(keys.file.path))


# ---- generation_config.json


def generation_of(file: GgufFile) -> dict[str, Any]:
    """The tokens that begin and end a text. A file names up to three ends. Many of chat models name the base model's
    alone: a control token that the chat template writes, with the name of an end of a turn, is one too."""
    ends = [number for number in (_id(file, key) for key in _ENDS) if number is not None]
    template = file.metadata.get("tokenizer.chat_template")
    tokens, kinds = (file.metadata.get(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type"))
    if isinstance(template, str) and isinstance(tokens, list) and isinstance(kinds, list):
        for number, (token, kind) in enumerate(zip(tokens, kinds, strict=False)):
            if kind == _CONTROL and token in _END_TEXTS and token in template:
                ends.append(number)
    found: dict[str, Any] = {"bos_token_id": _id(file, "bos_token_id"), "eos_token_id": list(dict.fromkeys(ends))}
    return {key: value for key, value in found.items() if value not in (None, [])}
