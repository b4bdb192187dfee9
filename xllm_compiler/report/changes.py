"""What a pass changed, line by line, with ops aligned. Owns comparing two texts of one module; no HTML.

Two lines are the same op where they differ only in the numbers that make SSA names unique: those shift whenever an op
before them comes or goes. So lines are aligned without the numbers, and a line counts as unchanged when the new names
of its operands' definitions turn the old line into the new one. Changes are grouped by layer, and a layer whose changes
look like an earlier layer's is only named.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Literal

from xllm_compiler.report.graph import layer_of

Kind = Literal["-", "+", " ", "…"]

_NAME = re.compile(r"%[A-Za-z0-9_.'$]+")
_SUFFIX = re.compile(r"_\d+$")
_LOC = re.compile(r' loc\("(?:[^"\\]|\\.)*":\d+, "((?:[^"\\]|\\.)*)".*\)$')
_PARAM = re.compile(r'= param\(name="((?:[^"\\]|\\.)*)"')
_COUNTED = re.compile(r"(%[A-Za-z0-9_.'$]+|\"(?:[^\"\\]|\\.)*\")")
_AT = re.compile(r"(, )?at=\[[^\]]*\]")


@dataclass(slots=True)
class Section:
    """The changed lines of one layer, with a line of context; `same`: other layers that changed alike."""

    layer: str
    lines: list[tuple[Kind, str]] = field(default_factory=list)
    same: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a module's text: without its loc, what it is aligned by, and its layer."""

    text: str
    key: tuple[str, str]
    layer: str


def changes(before: str, after: str) -> tuple[list[Section], int, int]:
    """The sections, and how many lines went and came."""
    old, new = list(_lines(before)), list(_lines(after))
    sections: dict[str, Section] = {}
    gone = come = 0
    entries = list(_compare(old, new))
    for i, (kind, line) in enumerate(entries):
        near = any(k != " " for k, _ in entries[max(0, i - 1) : i + 2])
        section = sections.setdefault(line.layer, Section(line.layer))
        if kind == " " and not near:
            if section.lines and section.lines[-1][0] != "…":
                section.lines.append(("…", ""))
            continue
        section.lines.append((kind, line.text))
        gone += kind == "-"
        come += kind == "+"
    found: dict[tuple[tuple[Kind, str], ...], Section] = {}
    for section in sections.values():
        while section.lines and section.lines[-1][0] == "…":
            section.lines.pop()
        if not any(kind in "-+" for kind, _ in section.lines):
            continue
        shape = tuple((kind, _shape(text)) for kind, text in section.lines)
        first = found.setdefault(shape, section)
        if first is not section:
            first.same.append(section.layer)
    return list(found.values()), gone, come


def _lines(text: str) -> Iterator[Line]:
    layer = ""
    for raw in text.splitlines():
        loc = _LOC.search(raw)
        line = raw[: loc.start()] if loc else raw
        param = _PARAM.search(line)
        path = param[1].rpartition(".")[0] if param else loc[1] if loc else ""
        if path:
            layer = layer_of(path)
        elif not line.startswith("  ") or line.lstrip().startswith("return"):
            layer = ""
        names = _NAME.sub(lambda m: _SUFFIX.sub("", m[0]), _AT.sub("", line))
        yield Line(line, (names, path), layer)


def _compare(old: list[Line], new: list[Line]) -> Iterator[tuple[Kind, Line]]:
    renamed: dict[str, str] = {}

    def now(line: Line) -> str:
        return _NAME.sub(lambda m: renamed.get(m[0], m[0]), line.text)

    matcher = SequenceMatcher(None, [x.key for x in old], [x.key for x in new], autojunk=False)
    for tag, a, b, c, d in matcher.get_opcodes():
        if tag == "equal":
            for x, y in zip(old[a:b], new[c:d], strict=True):
                renamed.update(zip(_results(x), _results(y), strict=False))
                if now(x) == y.text:
                    yield " ", y
                else:
                    yield "-", x
                    yield "+", y
            continue
        # A replaced value keeps its name but for the number: later lines that use it have not changed for that.
        heirs = {_SUFFIX.sub("", name): name for y in new[c:d] for name in _results(y)}
        for x in old[a:b]:
            for name in _results(x):
                renamed[name] = heirs.get(_SUFFIX.sub("", name), name)
            yield "-", x
        for y in new[c:d]:
            yield "+", y


def _results(line: Line) -> list[str]:
    left, equals, _ = line.text.partition(" = ")
    return _NAME.findall(left) if equals else []


def _shape(text: str) -> str:
    """A line without the numbers in names and quoted texts: alike in every layer that is built alike."""
    return _COUNTED.sub(lambda m: re.sub(r"\d+", "#", m[0].rstrip("_0123456789") if m[0][0] == "%" else m[0]), text)
