"""Opening the files of a directory that somebody else wrote. Owns the rule that nothing but a regular file of a bounded
size is read, whatever a name leads to, and what counts as JSON. Every failure is an XllmError("checkpoint" | "io")
that names the file; it must not know what the files mean.

A named pipe would make open() wait for ever, a device would never end. Symbolic links are fine: download caches are
made of them.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from xllm_compiler.errors import XllmError

MAX_JSON_BYTES = 64 << 20
"""A config or an index of a shard's tensors: the largest published ones have a few megabytes."""

MAX_TEXT_BYTES = 256 << 20
"""Vocabularies, tokenizers and templates."""

_SPARSE_FROM = 1 << 30  # bytes; smaller files are read quickly, holes or not


def damaged(message: str, where: Path | str, help: str = "") -> XllmError:
    """An error that blames the checkpoint."""
    return XllmError("checkpoint", message, where=str(where), help=help)


def stands_there(path: Path) -> bool:
    """Whether the directory has an entry of that name, a link that leads nowhere included."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    return True


def open_regular(path: Path, limit: int | None = None) -> BinaryIO:
    """The file, open for reading; it is regular, has at most `limit` bytes, and is not mostly holes.

    Never waits: pipes, sockets, devices and directories are refused, by links too."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except FileNotFoundError:
        what = "is a link to a file that is not there" if path.is_symlink() else "is missing"
        raise damaged(f"{path.name} {what}", path, "download it again" if path.is_symlink() else "") from None
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise damaged(f"{path.name} is {_kind(status.st_mode)}, not a file", path)
        if limit is not None and status.st_size > limit:
            raise damaged(f"{path.name} has {status.st_size} bytes, more than the {limit} that are read of it", path)
        if status.st_size > _SPARSE_FROM and status.st_blocks * 512 < status.st_size // 8:
            raise damaged(
                f"{path.name} is mostly holes: it claims {status.st_size} bytes and has {status.st_blocks * 512}",
                path,
                "its download is not complete; download it again",
            )
        return os.fdopen(fd, "rb")
    except BaseException:
        os.close(fd)
        raise


def read_regular(path: Path, limit: int) -> bytes:
    """All bytes of a regular file of at most `limit` bytes."""
    with open_regular(path, limit) as file:
        try:
            data = file.read(limit + 1)
        except OSError as error:
            raise _unreadable(path, error) from None
    if len(data) > limit:
        raise damaged(f"{path.name} grew beyond {limit} bytes while it was read", path)
    return data


def read_json(path: Path, *, twice: bool = False) -> dict[str, Any]:
    """The JSON object in `path`. XllmError("checkpoint") when it is missing, unreadable, not an object, or holds what
    no file of a checkpoint means: NaN, half a surrogate pair, a key twice (unless `twice`; then the last one wins)."""
    data = read_regular(path, MAX_JSON_BYTES)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise damaged(f"{path.name} is not UTF-8 text: {e.reason} at byte {e.start}", path) from None
    value = parse_json(text, path, path.name, twice=twice)
    if not isinstance(value, dict):
        raise damaged(f"{path.name} holds a JSON {type(value).__name__}, not an object", path)
    return value


def parse_json(text: str, where: Path | str, what: str, *, twice: bool = False) -> Any:
    """The value of a JSON text; `what` names it in errors."""
    try:
        value = json.loads(text, object_pairs_hook=None if twice else _no_duplicates, parse_constant=_constant)
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as e:
        half = e.object[e.start : e.end]
        raise damaged(f"{what} holds {half!r}, half a surrogate pair, which is no character", where) from None
    except (ValueError, RecursionError) as e:
        raise damaged(f"{what} is not valid JSON: {' '.join(str(e).split())[:300]}", where) from None
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in pairs:
        if key in out:
            raise ValueError(f"the key {key!r} stands there twice")
        out[key] = value
    return out


def _constant(text: str) -> float:
    if text == "NaN":
        raise ValueError("NaN is no number")
    return float(text)  # infinities stand in published configs


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a directory",
        stat.S_IFIFO: "a named pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(mode), "of another kind")


def _unreadable(path: Path, error: OSError | ValueError) -> XllmError:
    if isinstance(error, ValueError):  # a zero byte or half a surrogate pair in the name
        return damaged(f"{path.name!r} is no name of a file", str(path.parent))
    if error.errno in (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR):
        return damaged(f"{path.name[:80]!r} cannot be a file: {error.strerror}", str(path.parent))
    if error.errno == errno.ENXIO:  # what open() says of a socket, and of a device that is not there
        return damaged(f"{path.name} is a socket or a device, not a file", path)
    return XllmError("io", f"cannot read {path.name}: {error.strerror}", where=str(path))
