"""Programs run as somebody else, as containers do: no name, no home, no rights to what we own."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

UID = 54321


def run_as_other(command: list[str], cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run as a user id that has no name when we are root; else as ourselves. The environment is PATH and `env`."""
    prefix = ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups"] if os.getuid() == 0 else []
    return subprocess.run(
        [*prefix, *command],
        cwd=cwd,
        env={"PATH": os.environ["PATH"], **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def close_to_others(root: Path) -> None:
    """Nobody but root can write below `root` any more; everybody can read."""
    for path in [root, *root.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)


def open_to_all(root: Path) -> None:
    """Everybody may read below `root` and write into it."""
    for path in [root, *root.rglob("*")]:
        path.chmod(0o777 if path.is_dir() else 0o644)
