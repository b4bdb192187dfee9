"""Our attention in place of transformers' own, while a model is traced.

transformers lets a program register an attention function and a mask function by name. Ours records what each layer
asked for and leaves one custom op in the graph. Owns deciding what a mask and a set of arguments mean; it judges by
behaviour, not by name: the mask function is evaluated on a grid of positions, and the model's own eager attention is
run on random numbers beside ours. Whatever does not match exactly is refused, since the alternative is a model that
compiles and is subtly wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import library
from transformers import AttentionInterface, AttentionMaskInterface

from xllm_compiler.errors import XllmError

IMPLEMENTATION = "xllm"

# Arguments that cannot change what attention computes in a forward pass without a cache.
_HARMLESS = frozenset(
    {
        "dropout",
        "training",
        "deterministic",
        "is_causal",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "use_cache",
        "cache_position",
        "position_ids",
        "position_embeddings",
        "num_items_in_batch",
        "max_length_q",
        "max_length_k",
        "target_dtype",
        "layer_idx",
        "logits_to_keep",
        "head_mask",
        "use_top_left_mask",
    }
)
_MUST_BE_NONE = frozenset({"head_mask"})


class Mask:
    """What a model gets where it asked for an attention mask: opaque, so that using it for anything else fails."""

    def __init__(self, function: Callable[..., torch.Tensor] | None, padding: torch.Tensor | None) -> None:
        self.function = function
        self.padding = padding  # a mask over tokens that the model made; the importer insists that it is all ones


@dataclass
class AttendCall:
    """One attention call of the traced forward pass, in order of execution."""

    module: torch.nn.Module
    mask: Mask | None
    scale: float
    softcap: float
    sliding_window: int | None
    sinks_shape: tuple[int, ...] | None
    sinks_names: tuple[str, ...]  # the module's own parameters that are the sinks
    heads: tuple[int, int]
    dims: tuple[int, int]  # key and value size of one head
    extra: dict[str, Any] = field(default_factory=dict)
    window: int = 0  # decided from the mask after tracing


_calls: list[AttendCall] | None = None


@library.custom_op("xllm::attend", mutates_args=())
def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    padding: torch.Tensor | None,
    call: int,
) -> torch.Tensor:
    """Stand-in for attention: query [1, Hq, N, Dk], key [1, Hk, N, Dk], value [1, Hk, N, Dv] to [1, N, Hq, Dv]."""
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])


@attend.register_fake
def _attend_shape(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    padding: torch.Tensor | None,
    call: int,
) -> torch.Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])


def _unsupported(module: torch.nn.Module, message: str, help: str = "") -> XllmError:
    return XllmError("unsupported", f"{type(module).__name__}: {message}", help=help)


def _hook(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: object = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls in place of its own attention."""
    if _calls is None:
        raise XllmError("internal", f"the attention implementation {IMPLEMENTATION!r} exists only while tracing")
    if attention_mask is not None and not isinstance(attention_mask, Mask):
        raise _unsupported(module, "attention gets a mask that the model made by itself")
    extra = {}
    for name, given in sorted(kwargs.items()):
        if given is None or (name in _HARMLESS and name not in _MUST_BE_NONE):
            continue
        if name == "is_causal" and given is False:
            raise _unsupported(module, "attention that is not causal")
        raise _unsupported(module, f"attention takes the argument {name!r}, whose meaning is not known here")
    if kwargs.get("is_causal") is False or not getattr(module, "is_causal", True):
        raise _unsupported(module, "attention that is not causal")
    if "is_causal" in kwargs:
        extra["is_causal"] = kwargs["is_causal"]
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        raise _unsupported(module, f"attention over {query.dim()} axes, expected [batch, heads, tokens, size]")
    call = AttendCall(
        module=module,
        mask=attention_mask,
        scale=float(scaling) if scaling is not None else float(query.shape[-1]) ** -0.5,
        softcap=float(softcap) if softcap else 0.0,
        sliding_window=int(sliding_window) if sliding_window else None,
        sinks_shape=None if s_aux is None else tuple(int(d) for d in s_aux.shape),
        sinks_names=tuple(n for n, p in module.named_parameters(recurse=False) if p is s_aux),
        heads=(int(query.shape[1]), int(key.shape[1])),
        dims=(int(key.shape[3]), int(value.shape[3])),
        extra=extra,
    )
    _calls.append(call)
    padding = None if attention_mask is None else attention_mask.padding
    return torch.ops.xllm.attend(query, key, value, s_aux, padding, len(_calls) - 1), None


def _mask_hook(
    *args: object,
    mask_function: Callable[..., torch.Tensor] | None = None,
    attention_mask: torch.Tensor | None = None,
    **_: object,
) -> Mask:
    return Mask(mask_function, attention_mask)


AttentionInterface.register(IMPLEMENTATION, _hook)
AttentionMaskInterface.register(IMPLEMENTATION, _mask_hook)


@contextmanager
def recording() -> Iterator[list[AttendCall]]:
    """The attention calls made inside. Also stops transformers from looking for packed sequences in the positions."""
    global _calls
    import transformers.masking_utils as masking

    if _calls is not None:
        raise XllmError("internal", "two traces at once in one process")
    packed = masking.find_packed_sequence_indices
    _calls = []
    masking.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield _calls
    finally:
        _calls = None
        masking.find_packed_sequence_indices = packed


def decide(call: AttendCall) -> None:
    """Sets `call.window` from what the mask does, and checks our attention against the model's own.

    Raises XllmError("unsupported") for every mask but causal and sliding-window causal, and when the numbers differ.
    """
    if call.mask is None:
        raise _unsupported(call.module, "attention without a causal mask")
    call.window = _window(call)
    _compare(call)


# Token positions at which a mask is looked at, besides those around its own window.
_PROBES = (0, 1, 2, 3, 5, 8, 13, 17, 31, 64, 100, 257, 1023, 4097, 8191, 40_000, 131_071)
_SPAN = 16
_FAR = 1 << 20


def _seen(call: AttendCall, query: int, keys: list[int]) -> list[bool]:
    """Which of the positions `keys` the token at position `query` attends to."""
    assert call.mask is not None
    if call.mask.function is None:
        raise _unsupported(call.module, "attention without a mask function")
    zero = torch.zeros(len(keys), dtype=torch.long)
    try:
        seen = call.mask.function(zero, zero, zero + query, torch.tensor(keys, dtype=torch.long))
        return [bool(s) for s in torch.broadcast_to(seen, (len(keys),)).tolist()]
    except Exception as e:
        raise _unsupported(
            call.module, f"its attention mask is not a function of positions alone ({type(e).__name__})"
        ) from e


def _window(call: AttendCall) -> int:
    """0 for a causal mask, w for one that sees the last w positions; anything else is refused."""
    window = 0
    if not _seen(call, _FAR, [0])[0]:
        low, high = 0, _FAR  # the token does not see `low` and must see `high`, itself
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if _seen(call, _FAR, [middle])[0] else (middle, high)
        window = _FAR - high + 1
    queries = [*_PROBES, _FAR, *(window * m + d for m in (1, 2) for d in (-2, -1, 0, 1) if window)]
    for query in sorted({q for q in queries if q >= 0}):
        edge = max(0, query - window + 1) if window else 0
        near = {p for c in (0, edge, query) for p in range(max(0, c - _SPAN), c + _SPAN)}
        keys = sorted(near | {query // 2, query // 3})
        if _seen(call, query, keys) != [edge <= p <= query for p in keys]:
            raise _unsupported(call.module, "its attention mask is neither causal nor a sliding window")
    return window


def _reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, call: AttendCall, sinks: torch.Tensor | None
) -> torch.Tensor:
    """kv.attend's equation in torch: [1, Hq, N, D] inputs, [1, N, Hq, Dv] out."""
    group = call.heads[0] // call.heads[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (q @ k.transpose(2, 3)) * call.scale
    if call.softcap:
        scores = torch.tanh(scores / call.softcap) * call.softcap
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.reshape(1, -1, 1, 1).expand(-1, -1, scores.shape[2], 1)], -1)
    weights = torch.softmax(scores, -1)
    if sinks is not None:
        weights = weights[..., :-1]
    return (weights @ v).transpose(1, 2)


@contextmanager
def _sinks(module: torch.nn.Module, names: tuple[str, ...], values: torch.Tensor | None) -> Iterator[None]:
    """Inside, the module's own parameters `names` have these values: some eager attentions read them there."""
    before = {n: module._parameters[n] for n in names}
    if values is not None:
        module._parameters.update({n: torch.nn.Parameter(values, requires_grad=False) for n in names})
    try:
        yield
    finally:
        module._parameters.update(before)


def _compare(call: AttendCall) -> None:
    """Runs the model's own eager attention function beside kv.attend's equation on random numbers."""
    module = call.module
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise _unsupported(module, "the model has no eager attention to check ours against")
    generator = torch.Generator().manual_seed(0)
    n, (hq, hk), (dk, dv) = 6, call.heads, call.dims
    if hk == 0 or hq % hk:
        raise _unsupported(module, f"{hq} query heads over {hk} key heads")

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    q, k, v = random(1, hq, n, dk) * 3, random(1, hk, n, dk) * 3, random(1, hk, n, dv)
    keep = torch.ones(n, n).tril().bool()[None, None]
    additive = torch.zeros(1, 1, n, n).masked_fill(~keep, torch.finfo(torch.float32).min)
    sinks = None if call.sinks_shape is None else random(*call.sinks_shape)
    arguments: dict[str, Any] = {"scaling": call.scale, "dropout": 0.0, "sliding_window": call.sliding_window}
    if call.softcap:
        arguments["softcap"] = call.softcap
    if sinks is not None:
        arguments["s_aux"] = sinks
    try:
        with _sinks(module, call.sinks_names, sinks):
            theirs = eager(module, q, k, v, additive, **arguments, **call.extra)[0]
    except XllmError:
        raise
    except Exception as e:
        raise _unsupported(
            module, f"its eager attention cannot be run beside ours ({type(e).__name__}: {str(e)[:120]})"
        ) from e
    ours = _reference(q, k, v, keep, call, sinks)
    if isinstance(theirs, torch._subclasses.FakeTensor) or tuple(theirs.shape) != tuple(ours.shape):
        raise _unsupported(module, "its attention reads parameters of its own, or gives another shape")
    if not torch.allclose(theirs.float(), ours, rtol=1e-4, atol=1e-5):
        raise _unsupported(module, "its attention computes something else than softmax(scale * q k) v")
