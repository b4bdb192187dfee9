"""Numbers in config.json that nobody means: they are found before a model is built, which would take hours or all
memory. Owns the bounds; must not import anything slow. What is wrong by less is found by the shapes of the tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from xllm_compiler.frontend.files import damaged

MAX_COUNT: Final = 1 << 16
"""Most layers, experts, heads, labels: transformers makes a Python object for each of some of them."""

MAX_POSITIONS: Final = 1 << 24
"""Longest sequence of which a config may speak, in tokens: some models compute a table with a row for each."""

LENGTH_KEYS: Final = (
    "max_position_embeddings",
    "n_positions",
    "max_sequence_length",
    "max_seq_len",
    "seq_length",
    "n_ctx",
    "max_target_positions",
)
"""Where the configs of different families say how many positions the model was made for."""

_COUNTED: Final = re.compile(r"layer|label|block|expert|head|codebook|stage|level|depth|group|pattern")
_MEASURED: Final = re.compile(r"size|length|position|token|_id\b|_ids\b|dim|index|window|theta|capacity")
_LAYERS: Final = re.compile(r"(num_|n_)?((hidden|decoder|encoder|transformer)_)?layers?|num_blocks|n_blocks")


def check_counts(config: Mapping[str, Any], where: Path, tensors: int) -> None:
    """Raises XllmError("checkpoint") for a count or a length that no model has, and for more layers than the
    checkpoint has `tensors` (0: not known)."""
    help = "config.json and the weights do not belong together" if tensors else ""
    for key, value in _numbers(config):
        if key in LENGTH_KEYS and value > MAX_POSITIONS:
            raise damaged(f"{key} is {value}, more than any model's: at most {MAX_POSITIONS} can be read", where)
        if _LAYERS.fullmatch(key) and tensors and value > tensors:
            raise damaged(f"{key} is {value}, but the checkpoint has {tensors} tensors in all", where, help)
        if _COUNTED.search(key) and not _MEASURED.search(key) and value > MAX_COUNT:
            raise damaged(f"{key} is {value}, more than any model has: at most {MAX_COUNT} can be read", where, help)


def _numbers(value: Any, key: str = "", depth: int = 0) -> Iterator[tuple[str, int]]:
    """Every whole number with the key under which it stands, and the length of every list."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if value == value and abs(value) != float("inf"):
            yield key, int(value)
    elif isinstance(value, dict) and depth < 8:
        for inner, item in value.items():
            yield from _numbers(item, str(inner), depth + 1)
    elif isinstance(value, list):
        yield key, len(value)
