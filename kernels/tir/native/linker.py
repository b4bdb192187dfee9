"""Finds the program that links for an architecture."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import sys

from xllm_compiler.errors import XllmError


def find_linker(machine: str) -> list[str]:
    """The command that links for `machine`, an architecture as `platform.machine()` names it.

    It is `cc` for this machine's architecture. For another it is the C compiler of the package ziglang, else GNU's
    cross compiler. Raises XllmError("io") if there is none."""
    here = platform.machine()
    if machine == here:
        if shutil.which("cc"):
            return ["cc"]
        raise XllmError("io", "no linker: `cc` was not found", help="install gcc or clang to compile for the CPU")
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-P", "-m", "ziglang", "cc", "-target", f"{machine}-linux-gnu"]
    cross = f"{machine}-linux-gnu-gcc"
    if shutil.which(cross):
        return [cross]
    raise XllmError(
        "io",
        f"no linker: nothing on this {here} links for {machine}",
        help=f"pip install 'xllm-compiler[cross]', or install Debian's gcc-{machine.replace('_', '-')}-linux-gnu",
    )
