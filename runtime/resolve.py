"""From what a user names to an artifact directory. Owns the one place where the runtime asks for a compile: as another
process, since this one must import neither compiler nor torch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from xllm_compiler.artifact import is_artifact
from xllm_compiler.errors import XllmError

# Prints the artifact's path on its stdout. It asks Linux to end it with us (PR_SET_PDEATHSIG, SIGTERM): whoever stops
# the server while it compiles wants the processor back.
_COMPILE = "import ctypes; ctypes.CDLL(None).prctl(1, 15); from xllm_compiler.tools.compile import entry; entry()"


def resolve_artifact(
    path: Path, *, compile_options: Sequence[str] = (), tell: Callable[[str], None] | None = None
) -> Path:
    """The artifact at `path`, or the one that a checkpoint at `path` compiles to, from the cache when it is there.

    `compile_options` are passed to xllm-compile. `tell` gets a line before a compile starts, since it can take minutes;
    its progress goes to our stderr. Raises XllmError: "option" when `path` is neither, "checkpoint" when the compiler
    refuses.
    """
    if is_artifact(path):
        return path
    if not (path / "config.json").is_file():
        what = "has neither manifest.json nor config.json" if path.is_dir() else "is not a directory"
        raise XllmError(
            "option",
            f"{path} {what}",
            help="name an artifact that xllm-compile wrote, or a Hugging Face checkpoint directory",
        )
    if tell is not None:
        tell(f"{path} is a checkpoint: compiling it into the cache, unless it is there")
    command = [sys.executable, "-c", _COMPILE, str(path), *compile_options]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    except OSError as error:
        raise XllmError("io", f"cannot start the compiler: {error}") from None
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        raise XllmError(
            "checkpoint",
            f"the checkpoint could not be compiled: xllm-compile ended with {done.returncode}, see above",
            where=str(path),
            help="the compiler needs its own packages: pip install 'xllm-compiler[compile]'",
        )
    found = Path(lines[-1])
    if not is_artifact(found):
        raise XllmError("internal", f"the compiler named {found}, which is no artifact")
    return found
