"""API keys from where they are kept. Owns reading the key file; what a key may look like is in settings."""

from __future__ import annotations

import logging
import os
import stat

from xllm_compiler.errors import XllmError
from xllm_compiler.runtime.server.settings import Settings, check_key

log = logging.getLogger("xllm.server")

_LARGEST_FILE = 2**20


def load_keys(settings: Settings) -> tuple[str, ...]:
    """The keys of --api-key, then those of --api-key-file; without any, no key is asked for.

    Raises XllmError("option") for a file that cannot be read or holds no key. A secret that did not arrive must not
    open the server.
    """
    if settings.api_key_file is None:
        return settings.api_keys
    return settings.api_keys + read_keys(settings.api_key_file)


def read_keys(path: str) -> tuple[str, ...]:
    """One key a line; empty lines do not count. Warns when others on this machine can read it."""
    try:
        # Not to wait for a writer, should it be a fifo.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            state = os.fstat(file.fileno())
            if not stat.S_ISREG(state.st_mode):
                raise _bad(path, "it is not a regular file")
            content = file.read(_LARGEST_FILE + 1)
    except OSError as error:
        raise _bad(path, error.strerror or str(error)) from None
    if len(content) > _LARGEST_FILE:
        raise _bad(path, f"it is larger than {_LARGEST_FILE} bytes")
    keys = []
    for number, line in enumerate(content.decode("latin-1").split("\n"), 1):
        if line.strip():
            try:
                keys.append(check_key(line.strip()))
            except ValueError as error:
                raise _bad(path, f"line {number}: {error}") from None
    if not keys:
        raise _bad(path, "there is no key in it")
    if state.st_mode & stat.S_IROTH:
        log.warning("%s can be read by every user of this machine; chmod 600 keeps its keys", path)
    return tuple(keys)


def _bad(path: str, why: str) -> XllmError:
    return XllmError("option", f"cannot take keys from {path}: {why}", where="--api-key-file", help="one key a line")
