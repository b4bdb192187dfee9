"""How long a sequence a model's config allows. Owns the reading of rope scaling for that purpose; must not import
anything slow, since options are checked with it.

Scaling by YaRN and linear scaling are switched on by a line in config.json while `max_position_embeddings` stays as it
was trained (the model cards of Qwen2.5 and Qwen3 say so), or are part of the model, with the length scaled already
(DeepSeek, gpt-oss, Gemma 3). Where both can be meant, the longer one may be asked for; the default is what
`max_position_embeddings` says.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from xllm_compiler.frontend.counts import LENGTH_KEYS


@dataclass(frozen=True, slots=True)
class Lengths:
    """In tokens. `trained`: what the config names as the model's length, None where it names none. `most`: what may be
    asked for; more than `trained` only by `scaling`, the type of rope that allows it."""

    trained: int | None
    most: int | None
    scaling: str = ""


def lengths_of(config: Mapping[str, Any]) -> Lengths:
    """Of the config of a language model, as JSON has it."""
    trained = next((n for n in (_positive(config.get(key)) for key in LENGTH_KEYS) if n is not None), None)
    if trained is None:
        return Lengths(None, None)
    best = Lengths(trained, trained)
    for rope, whole in _ropes(config):
        kind = rope.get("rope_type", rope.get("type"))
        length = _scaled(str(kind), rope, config, trained, whole)
        if length > (best.most or 0):
            best = Lengths(trained, length, str(kind))
    return best


def _ropes(config: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], bool]]:
    """Settings of rotary embeddings, and whether they are those of every layer."""
    found = config.get("rope_scaling") or config.get("rope_parameters")  # the older name wins in transformers too
    if not isinstance(found, Mapping):
        return
    inner = [value for value in found.values() if isinstance(value, Mapping)]
    if inner:
        yield from ((value, False) for value in inner)
    else:
        yield found, config.get("rope_local_base_freq") is None  # Gemma 3: local layers have a rope of their own


def _scaled(kind: str, rope: Mapping[str, Any], config: Mapping[str, Any], trained: int, whole: bool) -> int:
    """What one setting allows."""
    factor = rope.get("factor")
    if not isinstance(factor, (int, float)) or isinstance(factor, bool) or not math.isfinite(factor) or factor < 1:
        return trained
    named = _positive(config.get("original_max_position_embeddings"))
    named = named if named is not None else _positive(rope.get("original_max_position_embeddings"))
    original = trained if named is None else named
    match kind:
        case "yarn":
            return int(original * factor)
        case "linear" | "dynamic" if whole or named is not None:
            # A dynamic rope is refused later beyond the length at which its frequencies start to change.
            return int(original * factor)
        case "llama3" if trained <= original:  # in published configs the length is scaled already
            return int(original * factor)
    return trained


def _positive(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
