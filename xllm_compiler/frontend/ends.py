"""Which tokens end a text. Owns the places of a checkpoint that say so.

A checkpoint says it up to four times, and fine-tuning often changes one place only: the tokenizer gets <|im_end|> while
config.json keeps the base model's end. A model that means to stop must not be made to go on, so all of them count.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def ends_of_text(
    generation: Mapping[str, Any],
    config: Mapping[str, Any],
    tokenizer: int | None,
    *,
    vocab: int,
    default: tuple[int, ...],
) -> tuple[tuple[int, ...], list[str]]:
    """Token ids, and notes about what could not be used.

    `generation` and `config` are the JSON files as they stand, `tokenizer` the id of the tokenizer's eos_token,
    `vocab` the rows of logits; `default` is the model class's own, for a checkpoint that says nothing.
    """
    text = config.get("text_config")
    places: list[tuple[str, Any]] = [
        ("generation_config.json", generation.get("eos_token_id")),
        ("config.json", config.get("eos_token_id")),
        ("config.json's text_config", text.get("eos_token_id") if isinstance(text, Mapping) else None),
        ("the tokenizer", tokenizer),
    ]
    ids: list[int] = []
    notes: list[str] = []
    said = False
    for place, value in places:
        for item in value if isinstance(value, list) else [value]:
            if item is None:
                continue
            said = True
            number = int(item) if isinstance(item, str) and item.isascii() and item.isdigit() else item
            if isinstance(number, bool) or not isinstance(number, int):
                notes.append(f"{place} names {str(item)[:40]!r} as an end of text, which is no token id")
            elif not 0 <= number < vocab:
                notes.append(f"{place} names token {str(number)[:20]} as an end of text; the model has {vocab} tokens")
            elif number not in ids:
                ids.append(number)
    return (tuple(ids) if said else default), notes
