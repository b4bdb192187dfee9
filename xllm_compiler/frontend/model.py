"""Builds the unmodified transformers model that is traced, without memory for its weights.

Parameters become fake tensors (shape and dtype only) the moment a module registers them; buffers, such as a rotary
embedding's frequencies, keep the values that the model's constructor computed. Owns what has to be known about the
model as a whole: its info and its limits.
"""

from __future__ import annotations

import inspect
import math
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from xllm_compiler.errors import XllmError
from xllm_compiler.frontend.attention import IMPLEMENTATION
from xllm_compiler.frontend.checkpoint import Checkpoint
from xllm_compiler.frontend.lengths import Lengths, lengths_of
from xllm_compiler.step.interface import Pooling

TORCH_DTYPE = {"f32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class CheckpointInfo:
    """What the artifact's manifest and the runtime need to know about a model besides its step function."""

    architecture: str  # the transformers class, such as "Qwen3ForCausalLM"
    model_type: str
    vocab_size: int
    hidden_size: int
    layers: int  # attention layers, one KV cache each
    dtype: str
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    pooling: Pooling | None  # where there is an @embed


def load_config(checkpoint: Checkpoint) -> Any:
    """The transformers config of a checkpoint, unquantized. Never runs code that came with it."""
    raw = checkpoint.config
    where = str(checkpoint.config_file)
    kind = raw.get("model_type")
    if not isinstance(kind, str) or not kind:
        raise XllmError("checkpoint", "config.json has no model_type", where=where)
    try:
        known = AutoConfig.for_model(kind)
    except Exception:
        known = None
    if known is None:
        if raw.get("auto_map"):
            raise XllmError(
                "unsupported",
                f"model type {kind!r} needs code that comes with the checkpoint (auto_map), which is never run here",
                where=where,
            )
        raise XllmError("unsupported", f"unknown model type {kind!r}", where=where)
    try:
        if checkpoint.gguf is not None:
            config = type(known).from_dict(dict(raw))
        else:
            config = AutoConfig.from_pretrained(str(checkpoint.path), trust_remote_code=False, local_files_only=True)
    except Exception as e:
        raise XllmError("checkpoint", f"transformers rejects config.json: {_first_line(e)}", where=where) from e
    for setting in ("quantization_config", "compression_config"):  # the model is traced in its float form
        if hasattr(config, setting):
            delattr(config, setting)
    return config


def _first_line(e: BaseException) -> str:
    return " ".join(str(e).split())[:300] or type(e).__name__


@dataclass
class _Budget:
    """How much of a model may be built, counted while it is. A config that describes far more than the checkpoint holds
    would be built for hours before its tensors are compared; the margin is for tied, split and merged tensors."""

    where: str
    tensors: int
    elements: int

    @classmethod
    def of(cls, checkpoint: Checkpoint | None) -> _Budget:
        if checkpoint is None:  # a config alone: what takes some seconds to build
            return cls("config.json", 1 << 17, 1 << 62)
        held = sum(math.prod(entry.shape) for entry in checkpoint.tensors.values())
        return cls(str(checkpoint.config_file), 4 * len(checkpoint.tensors) + 64, 64 * held + (1 << 24))

    def spend(self, shape: tuple[int, ...]) -> None:
        """Raises XllmError("checkpoint") when there is nothing left."""
        self.tensors -= 1
        self.elements -= math.prod(shape)
        if min(self.tensors, self.elements) < 0:
            raise XllmError(
                "checkpoint",
                "config.json describes a model that is many times larger than any, or than what the checkpoint holds",
                where=self.where,
                help="config.json and the weights do not belong together",
            )


@contextmanager
def _bounded_memory(extra: int = 16 << 30) -> Iterator[None]:
    """Lets this process have no more than `extra` bytes of address space beyond what it has. Constructors compute
    tables of a size that config.json says; where that is absurd they fail here, and the machine goes on."""
    page = os.sysconf("SC_PAGE_SIZE")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * page
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = used + extra if soft == resource.RLIM_INFINITY else min(soft, used + extra)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def _fake_parameters(mode: FakeTensorMode, budget: _Budget) -> Iterator[None]:
    original = torch.nn.Module.register_parameter

    def register(self: torch.nn.Module, name: str, param: torch.nn.Parameter | None) -> None:
        if param is not None and not isinstance(param, FakeTensor):
            budget.spend(tuple(param.shape))
            with mode:
                empty = torch.empty(param.shape, dtype=param.dtype)
            param = torch.nn.Parameter(empty, requires_grad=False)
        original(self, name, param)

    torch.nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = original  # type: ignore[method-assign]


def build_model(
    config: Any, dtype: str, max_model_len: int, checkpoint: Checkpoint | None = None, *, head: bool = True
) -> Any:
    """The causal LM of `config` in eval mode, ready for tracing, or without `head` its base model.
    XllmError("unsupported") when transformers cannot, XllmError("checkpoint") when the model is out of all proportion
    to the tensors of `checkpoint`."""
    auto = AutoModelForCausalLM if head else AutoModel
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    try:
        with no_init_weights(), _fake_parameters(mode, _Budget.of(checkpoint)), _bounded_memory():
            model = auto.from_config(
                config, dtype=TORCH_DTYPE[dtype], attn_implementation=IMPLEMENTATION, trust_remote_code=False
            )
        model.tie_weights()
    except XllmError:
        raise
    except KeyError as e:
        if e.args != (IMPLEMENTATION,):
            raise _cannot_build(config, e) from e
        raise XllmError(
            "unsupported", f"{config.model_type!r} chooses among attentions of its own, which cannot be replaced"
        ) from e
    except Exception as e:
        raise _cannot_build(config, e) from e
    model.eval()
    for name, module in model.named_modules():
        # Positions that skip padding start at another number, and depend on which tokens are padding.
        if hasattr(module, "create_position_ids_from_input_ids"):
            raise XllmError("unsupported", f"{type(module).__name__} derives positions from token ids", where=name)
    _freeze_rope(model, max_model_len)
    _require_scaling(model, config, max_model_len)
    return model


def _cannot_build(config: Any, e: Exception) -> XllmError:
    return XllmError("unsupported", f"transformers cannot build {config.model_type!r}: {_first_line(e)}")


def _freeze_rope(model: torch.nn.Module, max_model_len: int) -> None:
    """Rotary embeddings that change with the length of the sequence: fixed where no request can be long enough.

    "dynamic" frequencies change beyond the trained length, "longrope" ones beyond the original length; below it both
    are the frequencies that the constructor computed.
    """
    for name, module in model.named_modules():
        kind = getattr(module, "rope_type", None)
        kinds = list(kind.values()) if isinstance(kind, dict) else [kind]
        changing = [k for k in kinds if isinstance(k, str) and ("dynamic" in k or k == "longrope")]
        if not changing:
            continue
        limit = _rope_limit(module, changing[0])
        if isinstance(kind, dict) or limit is None or max_model_len > limit:
            raise XllmError(
                "unsupported",
                f"rotary embedding {changing[0]!r} changes its frequencies with the length of the sequence",
                where=name,
                help=f"compile with a max model length of at most {limit}" if limit else "",
            )
        module.rope_type = "default"


def _require_scaling(model: torch.nn.Module, config: Any, max_model_len: int) -> None:
    """A length beyond the trained one is allowed by a rope that the model has, not only its config."""
    lengths = model_lengths(config)
    if lengths.trained is None or max_model_len <= lengths.trained:
        return
    kinds = [getattr(module, "rope_type", None) for module in model.modules()]
    if not any(lengths.scaling in (kind.values() if isinstance(kind, dict) else (kind,)) for kind in kinds):
        raise XllmError(
            "option",
            f"a max model length of {max_model_len} tokens: {config.model_type!r} takes no notice of the scaling "
            f"{lengths.scaling!r} in config.json",
            help=f"the model was made for {lengths.trained} tokens",
        )


def _rope_limit(module: Any, kind: str) -> int | None:
    parameters = getattr(module.config, "rope_parameters", None) or {}
    original = parameters.get("original_max_position_embeddings")
    if kind == "longrope":
        return int(original) if original else None
    cached = getattr(module, "max_seq_len_cached", None)
    limits = [int(x) for x in (original, cached) if x]
    return min(limits) if limits else None


def text_config(config: Any) -> Any:
    """The part of a config that describes the language model; the config itself for a text-only one."""
    return config.get_text_config(decoder=True)


def model_lengths(config: Any) -> Lengths:
    """What the config says of lengths, in tokens."""
    return lengths_of(text_config(config).to_dict())


def model_facts(
    config: Any,
    model: Any,
    generation: dict[str, Any],
    *,
    layers: int,
    vocab: int,
    dtype: str,
    max_model_len: int,
    pooling: Pooling | None,
) -> CheckpointInfo:
    text = text_config(config)
    eos = generation.get("eos_token_id", getattr(config, "eos_token_id", None))
    if eos is None:
        eos = getattr(text, "eos_token_id", None)
    ids = eos if isinstance(eos, (list, tuple)) else [eos]
    bos = generation.get("bos_token_id", getattr(config, "bos_token_id", None))
    if bos is None:
        bos = getattr(text, "bos_token_id", None)
    return CheckpointInfo(
        architecture=type(model).__name__,
        model_type=str(config.model_type),
        vocab_size=vocab,
        hidden_size=int(getattr(text, "hidden_size", 0)),
        layers=layers,
        dtype=dtype,
        max_model_len=max_model_len,
        eos_token_ids=tuple(int(i) for i in ids if isinstance(i, int) and 0 <= i < vocab),
        bos_token_id=int(bos) if isinstance(bos, int) and 0 <= bos < vocab else None,
        pooling=pooling,
    )


def takes(model: Any, argument: str) -> bool:
    """Whether the model's forward has an argument of that name."""
    return argument in inspect.signature(model.forward).parameters
