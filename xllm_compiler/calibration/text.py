"""The text that weights are rounded for: text/, a file for each kind, written for this purpose.

Losses are measured on another (`quant_eval/text.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from xllm_compiler.quant_eval.text import Window, begin, take

FOLDER: Final = Path(__file__).parent / "text"
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
    found, _ = begin(pieces(), tokenizer, vocab, longest, seed=1)
    return [window.ids for window in take([Window("", ids) for ids in found], tokens)]


def _cut(text: str) -> list[str]:
    out, piece = [], ""
    for line in text.splitlines(keepends=True):
        piece += line
        if len(piece.encode()) >= _PIECE:
            out.append(piece)
            piece = ""
    return [*out, piece] if piece else out
