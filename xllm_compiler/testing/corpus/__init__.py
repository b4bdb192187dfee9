"""The modules that every pass is held to: traced models, hand-written idioms, random graphs, and other people's tests.

    for entry in corpus([Path("tests/passes")]):
        module = entry.module()        # parsed anew: the caller may change it

Owns finding and reading them. Nothing is read before it is asked for, except the test inputs below given directories,
which are parsed to see whether they are modules at all. `traced/` is written by bench/corpus.py, `written/` by hand.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Final, Literal

from xllm_compiler.errors import XllmError
from xllm_compiler.ir.core import Module
from xllm_compiler.ir.parser import parse_module
from xllm_compiler.ir.printer import print_module
from xllm_compiler.ir.verify import verify
from xllm_compiler.testing.directives import CUT
from xllm_compiler.testing.graphs import random_module

Kind = Literal["traced", "written", "random", "test"]

TRACED: Final = Path(__file__).parent / "traced"
WRITTEN: Final = Path(__file__).parent / "written"
RANDOM: Final = 32
"""How many random graphs a corpus has unless told otherwise: seeds 0, 1, 2..."""

_FAMILIES: Final = re.compile(r"^// families: (.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Entry:
    """One module. `name` is where it comes from, such as "traced/llama" or "tests/a.xir#2"; unique in a corpus."""

    name: str
    kind: Kind
    read: Callable[[], str] = field(repr=False, compare=False)

    @cached_property
    def text(self) -> str:
        """The module as `.xir` text, comments included."""
        return self.read()

    @property
    def families(self) -> tuple[str, ...]:
        """The model families that trace to this module; none unless `kind` is "traced"."""
        return families_of(self.text) if self.kind == "traced" else ()

    def module(self) -> Module:
        """The module, parsed anew. Errors in it name the entry."""
        return parse_module(self.text, self.name)


def corpus(directories: Iterable[Path | str] = (), *, random_graphs: int = RANDOM) -> list[Entry]:
    """All entries, in a fixed order: traced, written, random, then the modules in `*.xir` below `directories`."""
    entries = [*_files(TRACED, "traced"), *_files(WRITTEN, "written")]
    entries += [Entry(f"random/{seed}", "random", partial(random_text, seed)) for seed in range(random_graphs)]
    for directory in directories:
        entries += _tests(Path(directory))
    return entries


def entry(name: str) -> Entry:
    """The shipped or random entry called `name`; an XllmError of kind "option" when there is none."""
    kind, _, rest = name.partition("/")
    if kind == "random" and rest.isdecimal():
        return Entry(name, "random", partial(random_text, int(rest)))
    shipped = {e.name: e for e in corpus(random_graphs=0)}
    if name not in shipped:
        raise XllmError("option", f"the corpus has no entry {name!r}", help="it has " + ", ".join(shipped))
    return shipped[name]


def random_text(seed: int) -> str:
    """The random graph of a seed; seeds with the same remainder by 4 have about the same size, 4 to 40 ops."""
    size = (4, 12, 24, 40)[seed % 4]
    return print_module(random_module(random.Random(seed).randrange, size))


def header(version: str, families: Sequence[str]) -> str:
    """The first lines of a traced file."""
    return (
        f"// Traced by bench/corpus.py with transformers {version}; do not edit.\n// families: {', '.join(families)}\n"
    )


def families_of(text: str) -> tuple[str, ...]:
    """The families that a traced file names."""
    found = _FAMILIES.search(text)
    return tuple(found.group(1).split(", ")) if found else ()


def _files(folder: Path, kind: Kind) -> Iterator[Entry]:
    for path in sorted(folder.glob("*.xir")):
        yield Entry(f"{kind}/{path.stem}", kind, partial(path.read_text, encoding="utf-8"))


def _tests(directory: Path) -> Iterator[Entry]:
    """Every part of every file that is a sound module. Inputs that are meant to be refused are not."""
    if not directory.is_dir():
        raise XllmError("option", f"{directory} is not a directory of test inputs")
    for path in sorted(directory.rglob("*.xir")):
        parts = split_inputs(path.read_text(encoding="utf-8"))
        for i, text in enumerate(parts, 1):
            name = str(path) if len(parts) == 1 else f"{path}#{i}"
            if is_module(text, name):
                yield Entry(name, "test", partial(str, text))


def split_inputs(text: str) -> list[str]:
    """The modules of a test file, which stand between lines such as `// -----`; each on the lines that it has there."""
    parts, lines = [], text.split("\n")
    begin = 0
    for i, line in enumerate([*lines, None]):
        if line is None or CUT.fullmatch(line.rstrip("\r")):
            parts.append("\n" * begin + "\n".join(lines[begin:i]))
            begin = i + 1
    return parts


def is_module(text: str, name: str) -> bool:
    """Whether `text` parses and verifies."""
    try:
        verify(parse_module(text, name))
    except XllmError:
        return False
    return True
