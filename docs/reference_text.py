"""What the pages that are written from code have in common: tables, and docstrings as prose."""

from __future__ import annotations

import inspect
import re


def first_paragraph(doc: str | None, where: str) -> str:
    """A docstring's first paragraph on one line, without what it raises."""
    if not doc:
        raise SystemExit(f"{where} has no docstring")
    text = " ".join(inspect.cleandoc(doc).split("\n\n")[0].split())
    return re.sub(r"\s*Raises [^.]*\.$", "", text)


def cell(text: str) -> str:
    """Text that may stand in a table."""
    return text.replace("|", "\\|").replace("\n", " ")


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(cell, line))} |\n" for line in lines)


def grouped(rows: list[list[str]]) -> list[list[str]]:
    """Rows that differ in their first cell only become one row, where the first of them stands."""
    names: dict[tuple[str, ...], list[str]] = {}
    for name, *rest in rows:
        names.setdefault(tuple(rest), []).append(name)
    return [[", ".join(some), *rest] for rest, some in names.items()]
