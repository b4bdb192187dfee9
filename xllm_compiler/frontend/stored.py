"""Which stored tensor is which tensor of the model. Owns the rule that what transformers loads is what runs, and that
nothing is left out in silence: ties that the weights contradict, tensors that are missing, tensors that nobody uses.

The rules are those of transformers' `from_pretrained` (modeling_utils.py: tie_weights, _adjust_missing_and_unexpected_
keys), but for one: where a stored tensor that transformers drops with a warning would change what the model computes,
the checkpoint is refused, since such a model is another than its weights were made for.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping
from typing import Any, Final

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from xllm_compiler.errors import XllmError
from xllm_compiler.frontend.checkpoint import Checkpoint
from xllm_compiler.frontend.shards import listing
from xllm_compiler.frontend.weights import Slot, match

_OF_ADAPTER: Final = "are those of an adapter"
_OF_QUANTIZED: Final = "are parts of quantized weights, of which no settings speak"
_APART: Final = "config.json and the weights do not belong together"

_ADAPTER: Final = re.compile(
    r"(^|\.)(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|base_layer|modules_to_save|original_module|ia3_l"
    r"|hada_w\d\w*|lokr_w\d\w*|oft_[rs])(\.|$)"
)
# The last part of names of tensors without which the integers of a weight mean nothing.
_QUANTIZED: Final = (
    *("qweight", "qzeros", "scales", "g_idx", "weight_packed", "weight_scale", "weight_scale_inv", "weight_scale_2"),
    *("weight_zero_point", "weight_shape", "weight_g_idx", "weight_global_scale", "SCB", "absmax", "quant_map"),
)
_OF_INPUTS: Final = (
    *("input_scale", "input_zero_point", "output_scale", "output_zero_point", "activation_scale", "input_scale_ub"),
    *("input_global_scale", "k_scale", "v_scale", "q_scale", "weight_format"),
)
# What constructors compute anew: rotary tables and causal masks, which older versions of transformers stored.
_COMPUTED: Final = re.compile(r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$|(^|\.)(position_ids|masked_bias)$")


def tied_names(model: torch.nn.Module) -> dict[str, tuple[str, ...]]:
    """Every parameter and buffer name -> all names of the same tensor, itself included, in the model's order."""
    groups: dict[int, list[str]] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        groups.setdefault(id(tensor), []).append(name)
    return {name: tuple(groups[id(tensor)]) for name, tensor in named}


def checkpoint_names(model: Any, checkpoint: Checkpoint) -> tuple[dict[str, str], dict[str, str]]:
    """Model tensor name -> the checkpoint's name for it, by transformers' own renaming rules; and what is left over:
    the checkpoint's name -> what it would be called in the model.

    XllmError("unsupported") when a tensor would have to be converted (split, merged, transposed) on the way.
    """
    rules = get_model_conversion_mapping(model)
    renamings = [r for r in rules if isinstance(r, WeightRenaming)]
    converters = [r for r in rules if isinstance(r, WeightConverter)]
    own = dict.fromkeys(_loaded_names(model), True)
    names: dict[str, str] = {}
    leftovers: dict[str, str] = {}
    for key in sorted(checkpoint.tensors, key=lambda key: (key not in own, key)):
        renamed, pattern = key, None
        if key not in own:
            renamed, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, own)
        if pattern is not None:
            raise XllmError(
                "unsupported",
                f"tensor {key!r} is stored in a form that has to be converted ({pattern})",
                where=str(checkpoint.tensors[key].file),
                help="mixture-of-experts models are not supported yet" if "expert" in key else "",
            )
        if renamed not in own:
            leftovers[key] = renamed
        elif renamed not in names:
            names[renamed] = key
        elif not checkpoint.equal(names[renamed], key):
            raise XllmError(
                "checkpoint",
                f"both {names[renamed]!r} and {key!r} are the model's {renamed!r}, with different values",
                where=str(checkpoint.tensors[key].file),
            )
    return names, leftovers


def _loaded_names(model: torch.nn.Module) -> Iterator[str]:
    """Parameters and buffers that a checkpoint may hold. Other buffers are computed by the constructor, whatever a
    checkpoint says of them."""
    for name, _ in model.named_parameters(remove_duplicate=False):
        yield name
    yield from _buffers(model)


def _buffers(model: torch.nn.Module) -> Iterator[str]:
    for prefix, module in model.named_modules():
        for name in module._buffers.keys() - module._non_persistent_buffers_set:
            yield f"{prefix}.{name}" if prefix else name


def untie(model: Any, names: Mapping[str, str], checkpoint: Checkpoint, quantized: Container[str]) -> list[str]:
    """Gives a tensor that the config ties to another, but that is stored with values of its own, a place of its own in
    the model, as transformers does. `quantized`: checkpoint names of tensors whose values are made of several. Returns
    a note for each."""
    notes = []
    for target, source in dict(getattr(model, "all_tied_weights_keys", {})).items():
        if target not in names or source not in names or names[target] == names[source]:
            continue
        one, other = names[target], names[source]
        if one not in quantized and other not in quantized and checkpoint.equal(one, other):
            continue
        parent, _, name = target.rpartition(".")
        module = model.get_submodule(parent)
        fake = getattr(module, name)
        if fake is not model.get_parameter(source):
            continue
        with fake.fake_mode:
            own = torch.empty(fake.shape, dtype=fake.dtype)
        setattr(module, name, torch.nn.Parameter(own, requires_grad=False))
        notes.append(
            f"{one} is stored with values of its own, although the config ties it to {other} (tie_word_embeddings): "
            "the stored values are used, as transformers uses them"
        )
    return notes


def judge_leftovers(model: Any, leftovers: Mapping[str, str], checkpoint: Checkpoint) -> list[str]:
    """Notes on tensors that nobody uses. Refuses, with XllmError("checkpoint"), those that belong to the model's own
    layers or say that the weights are not what they seem."""
    judge = _Judge(model, checkpoint)
    kept = {key: name for key, name in leftovers.items() if not judge.harmless(key, name)}
    wrong: dict[str, list[str]] = {}
    for key, name in kept.items():
        reason = judge.wrong(key, name)
        if reason:
            wrong.setdefault(reason, []).append(key)
    for reason, keys in wrong.items():
        help = f"{_APART}; transformers would drop these tensors with a warning and compute something else"
        if reason == _OF_ADAPTER:
            help = "merge the adapter into the model (in PEFT: merge_and_unload) and save it again"
        elif reason == _OF_QUANTIZED:
            help = "get the file with the settings, or the unquantized checkpoint"
        raise XllmError(
            "checkpoint",
            f"{len(keys)} stored tensors {reason}: {listing(keys)}",
            where=str(checkpoint.tensors[keys[0]].file),
            help=help,
        )
    if not kept:
        return []
    return [f"{len(kept)} stored tensors are no part of {type(model).__name__} and not used: {listing(kept)}"]


class _Judge:
    """What a tensor that the model does not have says about the two."""

    def __init__(self, model: Any, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.modules = dict(model.named_modules())
        self.buffers = frozenset(name for name, _ in model.named_buffers())
        self.ignored = [re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
        self.quantized = bool(checkpoint.config.get("quantization_config") or checkpoint.beside)
        predicted = getattr(model.config, "num_nextn_predict_layers", None)  # layers that guess tokens ahead
        self.predicted = predicted if isinstance(predicted, int) else 0

    def harmless(self, key: str, name: str) -> bool:
        """Whether dropping the tensor is what everybody means."""
        if any(pattern.search(key) or pattern.search(name) for pattern in self.ignored):
            return True
        if _COMPUTED.search(name) or name in self.buffers:
            return True
        shape = self.checkpoint.tensors[key].shape
        if len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]:  # a causal mask
            return True
        if self.quantized and name.rpartition(".")[2] in _OF_INPUTS:
            return True  # inputs and caches stay as they are; the notes of quantized checkpoints say so
        _, number, count = self.beyond(name)
        return count <= number < count + self.predicted

    def wrong(self, key: str, name: str) -> str:
        """Why a model without this tensor is another one, "" where it is not."""
        if _ADAPTER.search(name):
            return _OF_ADAPTER
        module, _, last = name.rpartition(".")
        if last in _QUANTIZED:
            return _OF_QUANTIZED
        layers, _, count = self.beyond(name)
        if layers:
            return f"are of layers beyond the {count} of {layers} that config.json describes"
        if module in self.modules and module:
            bias = last == "bias" and self.checkpoint.tensors[key].is_float
            if bias and not self.checkpoint.read(key).any():  # it adds nothing
                return ""
            return f"belong to modules of the model that have no {last!r}"
        outer, _, inner = module.rpartition(".")
        if outer in self.modules and any(part.isdigit() for part in outer.split(".")):
            return f"belong to modules {inner!r} that the model's layers do not have"
        return ""

    def beyond(self, name: str) -> tuple[str, int, int]:
        """The list of layers beyond whose end the tensor lies, its number there, and how many there are; "" and an
        impossible number for other tensors."""
        parts = name.split(".")
        for i, part in enumerate(parts):
            if part.isascii() and part.isdigit() and len(part) < 10:
                layers = ".".join(parts[:i])
                found = self.modules.get(layers)
                if isinstance(found, torch.nn.ModuleList) and len(found) <= int(part):
                    return layers, int(part), len(found)
        return "", -1, 0


def check_weights(model: torch.nn.Module, names: Mapping[str, str], checkpoint: Checkpoint) -> list[str]:
    """Before anything slow: every parameter is in the checkpoint, with the model's shape. XllmError("checkpoint").
    Returns a note on buffers that are not stored."""
    tied = tied_names(model)
    for name, parameter in model.named_parameters():
        key = next((names[n] for n in tied[name] if n in names), None)
        if key is None:
            raise XllmError(
                "checkpoint",
                f"tensor {name!r} is missing",
                where=str(checkpoint.path),
                help="the checkpoint does not hold all weights of the model that config.json describes",
            )
        match(Slot(name, "f32", tuple(parameter.shape), key=key), checkpoint)
    patterns = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    absent = [name for name in _buffers(model) if name not in names]
    absent = [name for name in absent if not any(re.search(pattern, name) for pattern in patterns)]
    if not absent:
        return []
    return [f"{len(absent)} buffers are not stored and keep what the model starts with: {listing(absent)}"]
