"""What the command-line tools print: progress, tables, sizes, errors. Owns the look, and the one environment dial,
XLLM_DEBUG (docs/debugging.md has its table); must not know what is shown."""

from __future__ import annotations

import errno
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from xllm_compiler.errors import XllmError


class ConsoleProgress:
    """Phases on `stream`: on a terminal a line that is rewritten, elsewhere one line per finished phase."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._live = self._stream.isatty()
        self._shown = 0.0
        self._name = ""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the enclosed work under `name`."""
        started = time.perf_counter()
        self._name = name
        self._status(f"{name} ...")
        try:
            yield
        except BaseException:
            self._status("")
            raise
        self._line(f"{name:<10} {time.perf_counter() - started:8.2f} s")

    def advance(self, what: str, done: float) -> None:
        """The running phase now does `what`; `done`, 0 to 1, of it is behind us."""
        now = time.perf_counter()
        if self._live and (now - self._shown > 0.05 or done >= 1):
            self._shown = now
            self._status(f"{self._name} {done:4.0%} {what}")

    def note(self, text: str) -> None:
        """Something that the user should know, once."""
        self._line(f"note: {text}")

    def _status(self, text: str) -> None:
        if self._live:
            self._stream.write(f"\r\x1b[K{text[:110]}")
            self._stream.flush()

    def _line(self, text: str) -> None:
        self._status("")
        self._stream.write(f"{text}\n")
        self._stream.flush()


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Rows as text with aligned columns; those in `right` are aligned to the right."""
    if not rows:
        return ""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


def size(count: int) -> str:
    """A number of bytes for people: 1.5 MiB."""
    if count < 1024:
        return f"{count} B"
    value = float(count)
    for unit in ("KiB", "MiB", "GiB"):
        value /= 1024
        if value < 1024:
            return f"{value:.1f} {unit}"
    return f"{value / 1024:.1f} TiB"


DEBUG = "XLLM_DEBUG"
MAX_DEBUG = 4
DUMP_DIR = "xllm-dump"
"""Where level 4 writes the IR after every pass, below the working directory."""


def debug_level() -> int:
    """The value of XLLM_DEBUG, 0 where it is not set. Raises kind "option" for anything but a level."""
    text = os.environ.get(DEBUG, "")
    if text not in ("", *map(str, range(MAX_DEBUG + 1))):
        raise XllmError("option", f"{DEBUG}={text} is not a level", help=f"give a number from 0 to {MAX_DEBUG}")
    return int(text or 0)


def print_error(error: XllmError) -> None:
    """The error's text on standard error."""
    print(error_text(error), file=sys.stderr)


def run(main: Callable[[], int], show: Callable[[XllmError], None] = print_error) -> int:
    """Run a tool: our errors go to `show` and become their exit code, other exceptions one line and exit code 1. From
    level 1 of XLLM_DEBUG on, tracebacks are shown. argparse's exits are exit codes."""
    debug = 0
    try:
        debug = debug_level()
        return main()
    except SystemExit as done:  # argparse has said what it had to
        return done.code if isinstance(done.code, int) else 2
    except XllmError as error:
        if debug:
            traceback.print_exc()
        show(error)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains while it exits
        return 1
    except MemoryError as error:
        if debug:
            traceback.print_exc()
        short = XllmError("capacity", f"not enough memory: {error}".rstrip(": "), help="ask for smaller sizes")
        show(short)
        return short.exit_code
    except OSError as error:
        if debug:
            traceback.print_exc()
        refused = os_error(error)
        show(refused)
        return refused.exit_code
    except Exception as error:
        if debug:
            traceback.print_exc()
        internal = XllmError(
            "internal", f"{type(error).__name__}: {error}", help=f"this is a bug of ours; {DEBUG}=1 shows where"
        )
        show(internal)
        return internal.exit_code


def os_error(error: OSError) -> XllmError:
    """What the file system or the network refused, where nobody nearer to it had more to say."""
    where = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""
    help_ = ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        help_ = "free some space, or set TMPDIR to a directory that has some"
    elif "temporary directory" in str(error):
        help_ = "set TMPDIR to a directory that can be written"
    return XllmError("io", error.strerror or str(error), where=where, help=help_)


def error_text(error: XllmError) -> str:
    """The error and the notes that were added on its way up, such as the pass that was running."""
    return "\n".join([str(error), *(f"  {note}" for note in getattr(error, "__notes__", ()))])
