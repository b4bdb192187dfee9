"""Text to tokens. Owns the lexical syntax of `.xir` and errors with a line and a caret; must not know the grammar.

`//` is a comment to the end of the line, except inside brackets after an operand, where it is floor division:
`i32[N // 16]`. An `assume` line is one token up to its `>= 0`, for the same reason.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal

from xllm_compiler.ir.diag import IrError

TokenKind = Literal["name", "value", "global", "number", "string", "punct", "assume", "end"]

_TOKEN: Final = re.compile(
    r"""
      (?P<space>[ \t\r]+)
    | (?P<newline>\n)
    | (?P<comment>//)
    | (?P<value>%[A-Za-z0-9_.'$]+)
    | (?P<global>@[A-Za-z0-9_.'$-]+)
    | (?P<number>[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)
    | (?P<name>[A-Za-z_][A-Za-z0-9_.]*)
    | (?P<string>"(?:[^"\\\n]|\\.)*")
    | (?P<punct>->|>=|[][(){}<>,:=!+*%-])
    """,
    re.VERBOSE,
)
_ASSUME: Final = re.compile(r"assume\s+([^\n]*?)\s*>=\s*0[ \t\r]*(?=//|\n|\Z)")


@dataclass(frozen=True, slots=True)
class Token:
    """`start` and `end` are character offsets into the source, `line` counts from 1."""

    kind: TokenKind
    text: str
    start: int
    end: int
    line: int


class Source:
    """A text with a name: what errors point into."""

    def __init__(self, text: str, filename: str) -> None:
        self.text = text
        self.filename = filename

    def line_of(self, offset: int) -> int:
        """1-based line number."""
        return self.text.count("\n", 0, offset) + 1

    def error(self, message: str, start: int, end: int | None = None, help: str = "") -> IrError:
        """An IrError that shows the line of `start` with carets under start..end."""
        begin = self.text.rfind("\n", 0, start) + 1
        stop = self.text.find("\n", start)
        line = self.text[begin : stop if stop >= 0 else len(self.text)]
        width = max(1, min((end or start + 1) - start, len(line) - (start - begin)))
        shown, offset = line, start - begin
        if len(line) > 160:
            cut = max(0, offset - 60)
            shown, offset = line[cut : cut + 160], offset - cut
            width = min(width, len(shown) - offset) or 1
        caret = " " * offset + "^" * width
        where = f"{self.filename}:{self.line_of(start)}:{start - begin + 1}\n    {shown}\n    {caret}"
        return IrError(message, where=where, help=help)


def tokenize(source: Source) -> tuple[list[Token], dict[int, str]]:
    """All tokens, an "end" token last, and the comment of each line that has one after code."""
    text = source.text
    tokens: list[Token] = []
    comments: dict[int, str] = {}
    at, line, depth, first = 0, 1, 0, True
    while at < len(text):
        m = _TOKEN.match(text, at)
        if m is None:
            raise source.error(f"unexpected character {text[at]!r}", at)
        kind = m.lastgroup
        end = m.end()
        if kind == "newline":
            line, first = line + 1, True
        elif kind == "comment":
            if depth and not first and tokens and tokens[-1].text not in (",", "(", "[", "{"):
                tokens.append(Token("punct", "//", at, end, line))
            else:
                stop = text.find("\n", at)
                end = len(text) if stop < 0 else stop
                if not first:
                    comments[line] = text[at + 2 : end].strip()
        elif kind == "name" and first and depth == 0 and m.group() == "assume":
            whole = _ASSUME.match(text, at)
            if whole is None:
                raise source.error("an assumption reads `assume EXPR >= 0`", at, end)
            end = whole.end()
            tokens.append(Token("assume", whole.group(1), at, whole.start(1) + len(whole.group(1)), line))
            first = False
        elif kind != "space":
            piece = m.group()
            depth += 1 if piece in ("(", "[") else -1 if piece in (")", "]") else 0
            depth = max(depth, 0)
            tokens.append(Token(_kind(kind), piece, at, end, line))
            first = False
        at = end
    tokens.append(Token("end", "", len(text), len(text), line))
    return tokens, comments


def _kind(group: str | None) -> TokenKind:
    match group:
        case "value":
            return "value"
        case "global":
            return "global"
        case "number":
            return "number"
        case "name":
            return "name"
        case "string":
            return "string"
        case _:
            return "punct"
