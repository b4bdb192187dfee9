"""Text files that the tools read and write, `-` for the standard streams. Owns the errors, not what is in the files."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from xllm_compiler.errors import XllmError

if TYPE_CHECKING:
    from xllm_compiler.ir.core import Module

STDIN = "<stdin>"
"""What standard input is called in messages."""


def read_text(path: str) -> str:
    """The text of a file, or of standard input for `-`. Raises kind "io" naming what is in the way."""
    try:
        data = _stdin() if path == "-" else Path(path).read_bytes()
    except FileNotFoundError:
        raise XllmError("io", f"there is no file {path}", help=_neighbour(path)) from None
    except IsADirectoryError:
        raise XllmError("io", f"{path} is a directory, not a file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise XllmError("io", f"cannot read {path}: {why}") from None
    name = display_name(path)
    if b"\0" in data:
        raise XllmError("io", f"{name} is a binary file, not text", where=f"byte {data.index(0)}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise XllmError(
            "io", f"{name} is not UTF-8 text: {error.reason}", where=f"{name}:{line}, byte {error.start}"
        ) from None
    return text.replace("\r\n", "\n")


def read_module(path: str, check: bool = True) -> Module:
    """The module in a file, or on standard input for `-`; verified unless `check` is false."""
    from xllm_compiler.ir.parser import parse_module
    from xllm_compiler.ir.verify import verify

    module = parse_module(read_text(path), display_name(path))
    if check:
        verify(module)
    return module


def write_text(path: str | None, text: str) -> None:
    """`text` into a file, or to standard output for None and `-`."""
    if path is None or path == "-":
        sys.stdout.write(text)
        sys.stdout.flush()
        return
    try:
        Path(path).write_text(text, encoding="utf-8")
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise XllmError("io", f"cannot write {path}: {why}") from None


def display_name(path: str) -> str:
    """How a file is called in messages."""
    return STDIN if path == "-" else path


def _stdin() -> bytes:
    buffer = getattr(sys.stdin, "buffer", None)  # a StringIO in tests has none
    return buffer.read() if buffer is not None else sys.stdin.read().encode("utf-8")


def _neighbour(path: str) -> str:
    from xllm_compiler.tools.arguments import nearest

    folder, name = os.path.split(path)
    try:
        near = nearest(name, sorted(os.listdir(folder or ".")))
    except OSError:
        return ""
    return f"did you mean {os.path.join(folder, near)}?" if near else ""
