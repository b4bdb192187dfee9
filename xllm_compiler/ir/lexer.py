"""Text to tokens. Owns the lexical syntax of `.xir` and errors with a line and a caret; must not know the grammar.

`//` is a comment to the end of the line, except inside brackets after an operand, where it is floor division:
`i32[N // 16]`. An `assume` line is one token up to its `>= 0`, for the same reason.
"""

from __future__ import annotations

import re
from typing import Final, Literal, NamedTuple

from xllm_compiler.ir.diag import IrError

TokenKind = Literal["name", "value", "global", "number", "string", "punct", "assume", "end"]

_TOKEN: Final = re.compile(
    r"""
    (?: (?P<space>[ \t\r]+)
    | (?P<newline>\n)
    | (?P<comment>//)
    | (?P<value>%[A-Za-z0-9_.'$]+)
    | (?P<global>@[A-Za-z0-9_.'$-]+)
    | (?P<number>[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)
    | (?P<name>[A-Za-z_][A-Za-z0-9_.]*)
    | (?P<string>"(?:[^"\\\n]|\\.)*")
    | (?P<punct>->|>=|[][(){}<>,:=!+*%-])
    )[ \t\r]*
    """,
    re.VERBOSE,
)
_KINDS: Final[dict[str, TokenKind]] = {
    "value": "value",
    "global": "global",
    "number": "number",
    "name": "name",
    "string": "string",
    "punct": "punct",
}
_ASSUME_END: Final = re.compile(r">=[ \t\r]*0[ \t\r]*(?=//|\n|\Z)")

MAX_TEXT: Final = 1 << 24  # characters; the step of a model with a hundred layers has half a million
MAX_TOKENS: Final = 1_000_000


class Token(NamedTuple):
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
        """An IrError that shows the line of `start` with carets under start..end. A long message is cut."""
        if len(message) > 600:
            message = f"{message[:600]}..."
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
    if len(text) > MAX_TEXT:
        raise source.error(f"a text of {len(text)} characters; at most {MAX_TEXT} are read", 0)
    tokens: list[Token] = []
    comments: dict[int, str] = {}
    at, line, depth, first = 0, 1, 0, True
    while at < len(text):
        m = _TOKEN.match(text, at)
        group = m.lastgroup if m else None
        if m is None or group is None:
            raise source.error(f"unexpected character {text[at]!r}", at)
        start, end = m.span(group)
        at = m.end()
        if len(tokens) > MAX_TOKENS:
            raise source.error(f"more than {MAX_TOKENS} tokens", start)
        kind = _KINDS.get(group)
        if kind is not None:
            piece = text[start:end]
            if first and depth == 0 and piece == "assume":
                stop = text.find("\n", end)
                last = _ASSUME_END.search(text, end, len(text) if stop < 0 else stop)
                if last is None:
                    raise source.error("an assumption reads `assume EXPR >= 0`", start, end)
                at = last.end()
                tokens.append(Token("assume", text[end : last.start()].strip(), start, last.start(), line))
            else:
                if piece in "([":
                    depth += 1
                elif piece in ")]":
                    depth = max(depth - 1, 0)
                tokens.append(Token(kind, piece, start, end, line))
            first = False
        elif group == "newline":
            line, first = line + 1, True
        elif group == "comment":
            if depth and not first and tokens and tokens[-1].text not in (",", "(", "[", "{"):
                tokens.append(Token("punct", "//", start, end, line))
                continue
            stop = text.find("\n", start)
            at = len(text) if stop < 0 else stop
            if not first:
                comments[line] = text[end:at].strip()
    tokens.append(Token("end", "", len(text), len(text), line))
    return tokens, comments
