"""Comments of `.xir` files, and what their first words were meant to be. Owns where a comment begins and how far off a
slip may be; must not know what any directive asks for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

WORD: Final = re.compile(
    r"(?P<word>[A-Za-z][A-Za-z0-9]*(?:[-_][A-Za-z0-9]+)*)(?P<literal>\{LITERAL\})?(?P<colon>\s*:)?"
)
_PIECE: Final = re.compile(r'"(?:[^"\\]|\\.)*"|//|[(\[]|[)\]]')


@dataclass(frozen=True, slots=True)
class Comment:
    """`start`: offset of its `//` in the text; `alone`: nothing else is in its line."""

    line: int
    start: int
    body: str
    alone: bool


def comments(text: str) -> Iterator[Comment]:
    """Every comment, by the lexer's rule: inside brackets `//` divides, unless it opens the line or follows an opening
    bracket or a comma. ERROR and REMARK are comments everywhere: they stand behind lines with brackets left open."""
    at, depth = 0, 0
    for number, line in enumerate(text.split("\n"), 1):
        for m in _PIECE.finditer(line):
            piece, before = m.group(), line[: m.start()].strip()
            if piece == "//":
                body = line[m.end() :].strip()
                marked = re.match(r"(ERROR|REMARK)\s*:", body) is not None
                if depth and before and before[-1] not in ",([{" and not marked:
                    continue
                yield Comment(number, at + m.start(), body, not before)
                break
            depth = depth + 1 if piece in "([" else max(depth - 1, 0) if piece in ")]" else depth
        at += len(line) + 1


def base(word: str) -> str:
    """CHECK-COUNT-3 is CHECK-COUNT."""
    return re.sub(r"-COUNT-[0-9]+\Z", "-COUNT", word)


def meant(m: re.Match[str], body: str, known: list[str]) -> str:
    """The directive that a comment's first word is or was meant to be, or "" where it is prose."""
    word = m["word"]
    plain = base(word.upper().replace("_", "-"))
    loud = word == word.upper() and len(word) > 1
    if not (loud or m["colon"] or word == body):
        return ""
    for name in known:
        if plain == name or plain.replace("-", "") == name.replace("-", ""):
            return name
    if len(plain) < 4 and not loud:
        return ""
    best = min(known, key=lambda name: _distance(plain, name))
    return best if _distance(plain, best) <= (1 if len(plain) < 6 else 2) else ""


def _distance(a: str, b: str) -> int:
    """Edits between two words; two letters that changed places are one."""
    rows = [list(range(len(b) + 1))]
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            row.append(min(rows[-1][j] + 1, row[-1] + 1, rows[-1][j - 1] + (x != y)))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                row[-1] = min(row[-1], rows[-2][j - 2] + 1)
        rows.append(row)
    return rows[-1][-1]
