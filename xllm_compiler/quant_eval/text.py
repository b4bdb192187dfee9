"""The tokens on which loss is measured: held_out.txt, cut into windows.

held_out.txt holds files of Python 3.11's standard library that the bundled model never saw (`models/corpus.py`),
divided by form feeds. They are under Python's licence, (c) Python Software Foundation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

HELD_OUT: Final = Path(__file__).parent / "held_out.txt"
WINDOW: Final = 128
"""Most tokens of a window; each is a request of its own, from position 0."""


def pieces() -> list[str]:
    """The held-out text in the order in which it is used."""
    return HELD_OUT.read_text(encoding="utf-8").split("\f")


def windows(tokenizer: Path | None, vocab: int, longest: int) -> tuple[list[NDArray[np.int32]], str]:
    """Token ids of the beginning of every piece, and what they are, for the report.

    Each has the special tokens that the model's tokenizer puts around a text, and at most `longest` tokens. Without a
    tokenizer, or where it makes ids that the model does not have, they are random ids, the same every time.
    """
    most = min(WINDOW, longest)
    if tokenizer is not None:
        from tokenizers import Tokenizer

        made = Tokenizer.from_file(str(tokenizer))
        ids = [np.array(item.ids[:most], np.int32) for item in made.encode_batch(pieces())]
        if all(len(each) and each.max() < vocab for each in ids):
            return ids, "held-out text"
    draw = np.random.Generator(np.random.Philox(0))
    return [draw.integers(0, vocab, most).astype(np.int32) for _ in pieces()], "random ids: no tokenizer"


def take(ids: list[NDArray[np.int32]], positions: int) -> list[NDArray[np.int32]]:
    """The first windows that hold `positions` tokens in all, the last one cut."""
    out: list[NDArray[np.int32]] = []
    for each in ids:
        part = each[: positions - sum(map(len, out))]
        if len(part):
            out.append(part)
    return out
