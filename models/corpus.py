"""The text the bundled model learns from: Python's own standard library, as source files and as chat turns.

Owns reading and splitting the corpus; must not know about tokens or models. Nothing is downloaded: the files are those
of the running interpreter, so the corpus is a function of the Python version alone (recorded by `train.py`).
"""

from __future__ import annotations

import ast
import hashlib
import platform
import sysconfig
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_ONE_IN = 25
"""One file in this many is never trained on; which ones is decided by the hash of the file's relative path."""

_SKIPPED_PARTS = frozenset({"site-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3"})


@dataclass(frozen=True)
class Turn:
    """One question and its answer, for the chat template."""

    user: str
    assistant: str


@dataclass(frozen=True)
class SourceFile:
    """One file of the standard library."""

    path: str
    text: str

    @property
    def held_out(self) -> bool:
        digest = hashlib.sha256(self.path.encode()).digest()
        return int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0


def python_version() -> str:
    """The version that decides what the corpus contains."""
    return platform.python_version()


def source_files() -> list[SourceFile]:
    """The standard library's modules, tests and bundled third-party code left out, in path order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED_PARTS.intersection(relative.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a handful of files declare another encoding; they are not worth a decoder here
        if text.strip():
            files.append(SourceFile(relative.as_posix(), text))
    return files


def chat_turns(source: SourceFile) -> Iterator[Turn]:
    """A turn for every documented function of the file: its name and summary ask, its source answers."""
    try:
        tree = ast.parse(source.text)
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        doc = ast.get_docstring(node)
        segment = ast.get_source_segment(source.text, node, padded=True)
        if not doc or not segment:
            continue
        code = textwrap.dedent(segment)
        if len(code) > 1600:
            continue
        summary = " ".join(doc.split("\n\n")[0].split())
        arguments = ast.unparse(node.args)
        yield Turn(f"Write a Python function `{node.name}({arguments})`. {summary}", code)
