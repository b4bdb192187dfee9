"""Which tokens end a text: all that any place of a checkpoint names."""

from __future__ import annotations

from typing import Any

import pytest

from xllm_compiler.frontend.ends import ends_of_text


@pytest.mark.parametrize(
    ("generation", "config", "tokenizer", "ids"),
    [
        (0, 0, 2, (0, 2)),
        ([5, 6], 0, None, (5, 6, 0)),
        (None, [3, 3], 3, (3,)),
        (None, None, 7, (7,)),
        (None, None, None, (9,)),
        ("4", None, None, (4,)),
        ([None, 1], None, None, (1,)),
    ],
)
def test_all_places_count(generation: Any, config: Any, tokenizer: int | None, ids: tuple[int, ...]) -> None:
    found, notes = ends_of_text(
        {"eos_token_id": generation}, {"eos_token_id": config}, tokenizer, vocab=10, default=(9,)
    )
    assert found == ids and not notes


def test_the_language_models_own_part_counts() -> None:
    config = {"eos_token_id": 1, "text_config": {"eos_token_id": [2, 3]}}
    assert ends_of_text({}, config, None, vocab=10, default=(9,))[0] == (1, 2, 3)


@pytest.mark.parametrize("value", [10, -1, "</s>", True, {"id": 1}, 2**70])
def test_what_cannot_be_an_end_is_noted(value: Any) -> None:
    found, notes = ends_of_text({"eos_token_id": [2, value]}, {}, None, vocab=10, default=(9,))
    assert found == (2,) and len(notes) == 1
