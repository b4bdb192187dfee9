"""From what a user names to an artifact directory; a checkpoint is compiled first.

That runs in another process, since this one must import neither compiler nor torch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from xllm_compiler.artifact import is_artifact
from xllm_compiler.errors import XllmError

_COMPILE = ("-P", "-m", "xllm_compiler.tools.compile")
"""Prints the path of the artifact on its standard output, or the error as JSON. -P keeps the current directory off
Python's path: it may be the checkpoint's, and nothing of that is imported."""


def resolve_artifact(
    path: Path, *, compile_options: Sequence[str] = (), tell: Callable[[str], None] | None = None
) -> Path:
    """The artifact at `path`, or the one that a checkpoint at `path` compiles to, from the cache when it is there.

    `compile_options` are passed to xllm-compile. `tell` gets a line before a compile starts, since it can take minutes;
    its progress goes to our stderr. Raises XllmError: "option" when `path` is neither; the compiler's own error when it
    refuses.
    """
    if is_artifact(path):
        return path
    if not (os.path.isfile(path / "config.json") or (path.suffix == ".gguf" and os.path.isfile(path))):
        what = "has neither manifest.json nor config.json" if os.path.isdir(path) else "is not a directory"
        if os.path.isdir(path) and not os.access(path, os.R_OK | os.X_OK):
            raise XllmError("io", f"{path} cannot be read by this user", help="give it read and search permission")
        raise XllmError(
            "option",
            f"{path} {what}",
            help="name an artifact that xllm-compile wrote, a Hugging Face checkpoint directory, or a GGUF file",
        )
    if tell is not None:
        tell(f"{path} is a checkpoint: compiling it into the cache, unless it is there")
    command = [sys.executable, *_COMPILE, str(path), *compile_options]
    try:
        # the program that runs already: its path may be closed to this user
        done = subprocess.run(command, executable="/proc/self/exe", stdout=subprocess.PIPE, text=True, check=False)
    except OSError as error:
        raise XllmError("io", f"cannot start the compiler: {error}") from None
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        raise _told(lines[-1] if lines else "") or XllmError(
            "internal",
            f"the compiler ended with {done.returncode} and gave no reason",
            where=str(path),
            help="-9: the system ended it, mostly for want of memory" if done.returncode == -9 else "",
        )
    found = Path(lines[-1])
    if not is_artifact(found):
        raise XllmError("internal", f"the compiler named {found}, which is no artifact")
    return found


def _told(line: str) -> XllmError | None:
    """The error that the compiler reports."""
    try:
        told = json.loads(line)
        error = XllmError(told["kind"], told["message"], where=told["where"], help=told["help"])
        for note in told["notes"]:
            error.add_note(note)
    except (ValueError, TypeError, KeyError):
        return None
    return error
