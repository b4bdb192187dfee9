"""Text to Dim. Owns the grammar of dim expressions; must not evaluate anything but its own nodes.

    sum := term (("+" | "-") term)*
    term := unary (("*" | "//" | "%") unary)*
    unary := "-" unary | atom
    atom := integer | name | "(" sum ")" | ("ceildiv" | "min" | "max") "(" ... ")"

Artifacts carry such text, so length and nesting are bounded and every refusal is an XllmError.
"""

from __future__ import annotations

import re

from xllm_compiler.dims.expr import FUNCTIONS, Dim, ceildiv, const, dmax, dmin, sym
from xllm_compiler.errors import XllmError

MAX_TEXT = 16384  # characters
MAX_DEPTH = 64  # nested parentheses, calls and minus signs
_TOKEN = re.compile(r"\s*(?:(\d+)|([A-Za-z_]\w*)|(//|[-+*%(),]))", re.ASCII)


def parse_dim(text: str) -> Dim:
    """The Dim written in `text`; `parse_dim(str(d)) is d`. An XllmError of kind "ir" names the column."""
    if len(text) > MAX_TEXT:
        raise XllmError("ir", f"dim expression of {len(text)} characters; at most {MAX_TEXT} are read")
    parser = _Parser(text)
    result = parser.sum(0)
    if parser.token:
        parser.fail(f"unexpected {parser.token!r}")
    return result


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.start = self.end = 0
        self.token = ""
        self.next()

    def fail(self, why: str) -> None:
        raise XllmError("ir", f"{why} in dim expression {self.text[:200]!r}", where=f"column {self.start + 1}")

    def next(self) -> str:
        taken = self.token
        match = _TOKEN.match(self.text, self.end)
        if match:
            self.token = match[match.lastindex or 0]
            self.start, self.end = match.end() - len(self.token), match.end()
        else:
            tail = self.text[self.end :]
            self.start = self.end + len(tail) - len(tail.lstrip())
            if tail.strip():
                self.fail(f"unexpected {tail.strip()[0]!r}")
            self.token = ""
        return taken

    def expect(self, token: str) -> None:
        if self.token != token:
            self.fail(f"expected {token!r}, found {self.token or 'the end'!r}")
        self.next()

    def sum(self, depth: int) -> Dim:
        total = self.term(depth)
        while self.token in ("+", "-"):
            total = total + self.term(depth) if self.next() == "+" else total - self.term(depth)
        return total

    def term(self, depth: int) -> Dim:
        product = self.unary(depth)
        while self.token in ("*", "//", "%"):
            operator = self.next()
            right = self.unary(depth)
            match operator:
                case "*":
                    product = product * right
                case "//":
                    product = product // right
                case _:
                    product = product % right
        return product

    def unary(self, depth: int) -> Dim:
        if depth > MAX_DEPTH:
            self.fail(f"nesting deeper than {MAX_DEPTH}")
        if self.token == "-":
            self.next()
            return -self.unary(depth + 1)
        return self.atom(depth + 1)

    def atom(self, depth: int) -> Dim:
        if self.token == "(":
            self.next()
            inner = self.sum(depth)
            self.expect(")")
            return inner
        if self.token in FUNCTIONS:
            name = self.next()
            self.expect("(")
            args = [self.sum(depth)]
            while self.token == ",":
                self.next()
                args.append(self.sum(depth))
            self.expect(")")
            if name != "ceildiv":
                return (dmin if name == "min" else dmax)(*args)
            if len(args) != 2:
                self.fail(f"ceildiv takes two arguments, not {len(args)}")
            return ceildiv(args[0], args[1])
        if self.token.isdigit():
            if len(self.token) > 1000:
                self.fail(f"an integer of {len(self.token)} digits")
            return const(int(self.next()))
        if not self.token or not (self.token[0].isalpha() or self.token[0] == "_"):
            self.fail(f"expected a number, a name or '(', found {self.token or 'the end'!r}")
        return sym(self.next())
