"""Where a compile's temporary files go, its own and those of the programs and packages it uses. Owns the environment
for as long as a compile runs; must not know what is written.

A kill leaves nothing behind that the next compile would not remove, and neither a full /tmp nor a user without a name
or a home directory (containers run as any user id) is in the way: everything goes into the one directory that the
compile must be able to write anyway.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

_HOMES: Final = {
    "HOME": "home",
    "XDG_CACHE_HOME": "home/.cache",
    "HF_HOME": "home/.cache/huggingface",
    "TORCH_HOME": "home/.cache/torch",
    "TORCHINDUCTOR_CACHE_DIR": "home/.cache/inductor",
    "TRITON_CACHE_DIR": "home/.cache/triton",
    "USER": "nobody",  # torch asks for it in order to name a directory
}
"""What packages that a compile imports take for granted, with a stand-in below the work directory (a name for USER)."""


@contextmanager
def temporary_files(folder: Path) -> Iterator[None]:
    """Meanwhile this process and those that it starts write temporary files into `folder`; without a home directory
    that can be written, what belongs there too."""
    changed = {name: os.fspath(folder) for name in ("TMPDIR", "TMP", "TEMP")}
    if not has_home():
        for name, place in _HOMES.items():
            if name == "HOME" or not os.environ.get(name):
                changed[name] = place if name == "USER" else os.fspath(folder / place)
    before = {name: os.environ.get(name) for name in changed}
    directory = tempfile.tempdir
    os.environ.update(changed)
    tempfile.tempdir = os.fspath(folder)
    try:
        yield
    finally:
        tempfile.tempdir = directory
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def has_home() -> bool:
    """Whether this user has a name and a home directory that can be written."""
    try:
        import getpass

        getpass.getuser()
        home = Path.home()
    except (KeyError, OSError, RuntimeError):
        return False
    return home.is_dir() and os.access(home, os.W_OK | os.X_OK)
