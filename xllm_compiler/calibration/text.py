"""The text that weights are rounded for: text/, a file for each kind, written for this purpose.

Losses are measured on another (`quant_eval/text.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

FOLDER: Final = Path(__file__).parent / "text"
WINDOW: Final = 128
"""Most tokens of a window; each is a request of its own, from position 0."""
_PIECE: Final = 500
"""Bytes of a piece at least, which ends with a line: its beginning is a window."""


def pieces() -> list[str]:
    """The text in the order in which it is used: a piece of every file in turn, so that a part has all kinds."""
    files = [_cut(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.txt"))]
    most = max(map(len, files))
    return [file[i] for i in range(most) for file in files if i < len(file)]


def calibration_ids(tokenizer: Path | None, vocab: int, longest: int, tokens: int) -> list[NDArray[np.int32]]:
    """Windows of at most `longest` tokens, `tokens` in all or as many as there are.

    Each has the special tokens that the model's tokenizer puts around a text. Without a tokenizer, or where it makes
    ids that the model does not have, they are random ids, the same every time."""
    windows: list[NDArray[np.int32]] = []
    for each in _windows(tokenizer, vocab, min(WINDOW, longest)):
        part = each[:tokens]
        tokens -= len(part)
        if len(part):
            windows.append(part)
    return windows


def _windows(tokenizer: Path | None, vocab: int, most: int) -> list[NDArray[np.int32]]:
    texts = pieces()
    if tokenizer is not None:
        from tokenizers import Tokenizer

        made = Tokenizer.from_file(str(tokenizer)).encode_batch(texts)
        ids = [np.array(item.ids[:most], np.int32) for item in made]
        if all(len(each) and each.max() < vocab for each in ids):
            return ids
    draw = np.random.Generator(np.random.Philox(1))
    return [draw.integers(0, vocab, most).astype(np.int32) for _ in texts]


def _cut(text: str) -> list[str]:
    out, piece = [], ""
    for line in text.splitlines(keepends=True):
        piece += line
        if len(piece.encode()) >= _PIECE:
            out.append(piece)
            piece = ""
    return [*out, piece] if piece else out
