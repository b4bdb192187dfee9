"""The tokens on which loss is measured: the files of held_out/, one for each kind of text, cut into windows.

code.txt holds files of Python 3.11's standard library that the bundled model never saw (`models/corpus.py`); they are
under Python's licence, (c) Python Software Foundation. The others were written for this purpose. Form feeds divide a
file into pieces.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

HELD_OUT: Final = Path(__file__).parent / "held_out"
WINDOW: Final = 128
"""Most tokens of a window; each is a request of its own, from position 0."""


@dataclass(frozen=True)
class Window:
    """The `ids` of some text of a `kind`, i32."""

    kind: str
    ids: NDArray[np.int32]


def pieces() -> list[tuple[str, str]]:
    """Kind and text of every piece, in the order in which they are used: the kinds by turns."""
    files = sorted(HELD_OUT.glob("*.txt"))
    texts = [[(file.stem, text) for text in file.read_text(encoding="utf-8").split("\f")] for file in files]
    return [piece for turn in zip_longest(*texts) for piece in turn if piece is not None]


def windows(tokenizer: Path | None, vocab: int, longest: int) -> tuple[list[Window], str]:
    """The beginning of every piece, and what the windows are, for the report.

    Each has the special tokens that the model's tokenizer puts around a text, and at most `longest` tokens. Without a
    tokenizer, or where it makes ids that the model does not have, they are random ids, the same every time.
    """
    found = pieces()
    ids, known = begin([text for _, text in found], tokenizer, vocab, longest, seed=0)
    kinds = [kind if known else "random" for kind, _ in found]
    what = "held-out text" if known else "random ids: no tokenizer"
    return [Window(kind, each) for kind, each in zip(kinds, ids, strict=True)], what


def begin(
    texts: list[str], tokenizer: Path | None, vocab: int, longest: int, seed: int
) -> tuple[list[NDArray[np.int32]], bool]:
    """The first tokens of every text, at most `longest` and WINDOW, with the special tokens that the tokenizer puts
    around it; and whether they are its own. Without a tokenizer, or where it makes ids that the model does not have,
    they are random ids of `seed`."""
    most = min(WINDOW, longest)
    if tokenizer is not None:
        from tokenizers import Tokenizer

        made = Tokenizer.from_file(str(tokenizer)).encode_batch(texts)
        ids = [np.array(item.ids[:most], np.int32) for item in made]
        if all(len(each) and each.max() < vocab for each in ids):
            return ids, True
    draw = np.random.Generator(np.random.Philox(seed))
    return [draw.integers(0, vocab, most).astype(np.int32) for _ in texts], False


def take(given: list[Window], positions: int) -> list[Window]:
    """The first windows that hold `positions` tokens in all, the last one cut."""
    out: list[Window] = []
    for each in given:
        part = each.ids[:positions]
        positions -= len(part)
        if len(part):
            out.append(Window(each.kind, part))
    return out
