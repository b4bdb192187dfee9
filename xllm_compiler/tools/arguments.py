"""Command lines: a parser whose refusals are XllmErrors that name the nearest right word, and the spelling of sizes.
Must not know any single tool, nor import anything slow: `--help` goes through here."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any, NoReturn

from xllm_compiler import __version__
from xllm_compiler.errors import XllmError

if TYPE_CHECKING:
    from xllm_compiler.dims import DimScope


class Arguments(argparse.ArgumentParser):
    """An ArgumentParser with our manners: no abbreviations, XllmError instead of a usage dump. Use `read`."""

    def __init__(self, prog: str, description: str, **rest: Any) -> None:
        super().__init__(
            prog=prog,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **rest,
        )
        self._without_value: list[str] = []
        self.add_argument("--version", action="version", version=f"{prog} {__version__}")

    def error(self, message: str) -> NoReturn:
        """Called by argparse for what it cannot accept."""
        help = f"{self.prog} --help tells what there is"
        if message.startswith("unrecognized arguments: ") and self._without_value:
            flag, word = self._without_value[0], message.partition(": ")[2]
            help = f"a value of {flag} follows an equals sign: {flag}={word}"
        raise XllmError("option", message, help=help)

    def read(self, argv: Sequence[str], mixed: bool = False) -> Any:
        """The namespace. `mixed`: positional arguments may stand anywhere between the flags."""
        given = self._prepared(argv)
        return self.parse_intermixed_args(given) if mixed else self.parse_args(given)

    def _prepared(self, argv: Sequence[str]) -> list[str]:
        """Unknown flags are found before argparse complains about what they seem to leave out; and a flag whose value
        is optional takes one by `=` only, so that it cannot swallow a file name."""
        given, self._without_value = list(argv), []
        for i, word in enumerate(given):
            if word == "--":
                break
            self._check_flag(word)
            action = self._option_string_actions.get(word)
            if action is not None and action.nargs == "?":
                self._without_value.append(word)
                given[i] = f"{word}={action.const}"
        return given

    def _check_flag(self, word: str) -> None:
        known = self._option_string_actions
        if not word.startswith("-") or word == "-" or re.match(r"-[\d.]", word):
            return
        flag = word.partition("=")[0]
        if flag in known or (not word.startswith("--") and word[:2] in known):
            return
        near = nearest(flag, [name for name in known if name.startswith("--")])
        help = f"did you mean {near}?" if near else f"{self.prog} --help lists them"
        raise XllmError("option", f"{self.prog} has no flag {flag}", help=help)


def whole_number(text: str) -> int:
    """For add_argument(type=..): digits only, so that `1_0` and `-1` are refused. argparse's message says its name."""
    if not re.fullmatch(r"\d{1,9}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on")
    return int(text)


def nearest(word: str, known: Sequence[str]) -> str:
    """The known word that is most like `word`, or "" when none is."""
    near = difflib.get_close_matches(word, known, n=1)
    return near[0] if near else ""


def suggest(word: str, known: Sequence[str], what: str) -> str:
    """Help text: the nearest known word, or all of them; `what` they are."""
    near = nearest(word, known)
    if near:
        return f"did you mean {near!r}?"
    return f"{what}: {', '.join(known)}" if known else f"there are no {what}"


def parse_sizes(texts: Sequence[str], flag: str) -> dict[str, int]:
    """`N=3 B=2` or `N=3,B=2`: one size per symbol."""
    out: dict[str, int] = {}
    for name, values in _assignments(texts, flag):
        if len(values) != 1:
            raise XllmError("option", f"{flag}: {name} has several sizes", help="give one, such as N=3")
        out[name] = values[0]
    return out


def parse_size_lists(text: str, flag: str) -> dict[str, tuple[int, ...]]:
    """`N=1,7;B=1,2`: several sizes per symbol."""
    return dict(_assignments([text], flag))


def _assignments(texts: Sequence[str], flag: str) -> list[tuple[str, tuple[int, ...]]]:
    found: dict[str, list[int]] = {}
    name = ""
    for text in texts:
        for piece in re.split(r"\s*[,;]\s*|\s+", text.strip()):
            head, equals, value = piece.rpartition("=")
            if equals:
                name = head.strip()
                if not re.fullmatch(r"[A-Za-z_]\w*", name):
                    raise XllmError(
                        "option", f"{flag}: {piece!r} is not a size", help="write SYMBOL=NUMBER, such as N=3"
                    )
                if name in found:
                    raise XllmError("option", f"{flag}: {name} is given twice")
                found[name] = []
            if not name or not re.fullmatch(r"\d{1,9}", value):
                raise XllmError("option", f"{flag}: {piece!r} is not a size", help="write SYMBOL=NUMBER, such as N=3")
            found[name].append(int(value))
        name = ""
    return [(symbol, tuple(values)) for symbol, values in found.items()]


def check_sizes(scope: DimScope, sizes: Mapping[str, int], flag: str) -> None:
    """XllmError of kind "option" for a symbol that the module lacks, or a size out of its declared range."""
    for name, n in sizes.items():
        symbol = scope.symbols.get(name)
        if symbol is None:
            raise XllmError(
                "option",
                f"{flag}: the module has no size {name}",
                help=suggest(name, list(scope.symbols), "its sizes"),
            )
        low = symbol.lo is not None and n < symbol.lo
        if low or (symbol.hi is not None and n > symbol.hi) or n % symbol.multiple:
            step = "" if symbol.multiple == 1 else f" in multiples of {symbol.multiple}"
            bounds = f"[{'*' if symbol.lo is None else symbol.lo}, {'*' if symbol.hi is None else symbol.hi}]"
            raise XllmError("option", f"{flag}: {name}={n} is outside {bounds}{step}", help=symbol.why)


def size_combinations(scope: DimScope, lists: Mapping[str, Sequence[int]], flag: str) -> list[dict[str, int]]:
    """Every combination of the given sizes that the module's assumptions allow.

    A combination like N=1, B=2 may break an assumption; a size that is left in no combination is an error.
    """
    for name, values in lists.items():
        for n in values:
            check_sizes(scope, {name: n}, flag)
    out = []
    for combination in product(*lists.values()):
        sizes = dict(zip(lists, combination, strict=True))
        if not _broken(scope, sizes):
            out.append(sizes)
    for name, values in lists.items():
        for n in values:
            if all(sizes[name] != n for sizes in out):
                one = {key: values[0] for key, values in lists.items()} | {name: n}
                shown = ", ".join(f"{k}={v}" for k, v in one.items())
                raise XllmError("option", f"{flag}: {shown} breaks the assumption {_broken(scope, one)}")
    return out


def _broken(scope: DimScope, sizes: Mapping[str, int]) -> str:
    """The first assumption that `sizes` alone show to be broken, as text, or ""."""
    for assumption in scope.assumptions:
        if all(name in sizes for name in assumption.expr.symbols) and assumption.expr.evaluate(sizes) < 0:
            return f"{assumption.expr} >= 0" + (f" ({assumption.why})" if assumption.why else "")
    return ""
