"""Reading an artifact directory and proving that it is whole. Owns what a reader needs; writing is `writer`."""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

from xllm_compiler.artifact.digest import digest_mapped, digest_open
from xllm_compiler.artifact.rules import read_text
from xllm_compiler.artifact.schema import MANIFEST, Manifest
from xllm_compiler.errors import XllmError

_MANIFEST_LIMIT = 64 << 20  # bytes; a manifest has a line per weight, so a few megabytes are already absurd
_AGAIN = "copy the artifact again or compile the checkpoint again"


def read_manifest(directory: Path) -> Manifest:
    """The validated manifest of the artifact at `directory`. Raises kind "artifact" when there is none, when it is of
    another format version or damaged, and kind "io" when it cannot be read."""
    path = directory / MANIFEST
    try:
        data = read_regular(path, _MANIFEST_LIMIT)
    except FileNotFoundError:
        raise _no_artifact(directory) from None
    except OSError as error:
        if not os.path.isdir(directory):
            raise _no_artifact(directory) from None
        raise XllmError("io", f"cannot read {MANIFEST}: {error.strerror}", where=str(path)) from None
    try:
        return read_text(data)
    except XllmError as error:
        where = f"{path}: {error.where}" if error.where else str(path)
        raise XllmError(error.kind, error.message, where=where, help=error.help) from None


def open_regular(path: Path) -> int:
    """A descriptor for reading, of a regular file only, links to one included: never waits for the other end of a pipe
    and starts no device. Raises OSError, and kind "artifact" for anything else."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise _not_regular(path)
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):  # exchanged in between
        os.close(fd)
        raise _not_regular(path)
    return fd


def read_regular(path: Path, limit: int) -> bytes:
    """The bytes of a regular file. Raises OSError, and kind "artifact" for anything else or more than `limit` bytes."""
    with open(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(size + 1) if size <= limit else b""
    if size > limit or len(data) > limit:
        raise XllmError("artifact", f"{path.name} has more than {limit} bytes", where=str(path), help=_AGAIN)
    return data


def _not_regular(path: Path) -> XllmError:
    return XllmError("artifact", f"{path.name} is not a file", where=str(path), help=_AGAIN)


def check_files(
    directory: Path,
    manifest: Manifest,
    names: Iterable[str] | None = None,
    mapped: Mapping[str, mmap.mmap] = MappingProxyType({}),
) -> None:
    """Check files of the artifact against the manifest: all sizes first, then digests, each byte read once.
    `names`: which to check; all when None. `mapped`: those that are in memory as a whole, which is what is checked.
    Raises kind "artifact" with the first file that is missing or differs."""
    chosen = sorted(manifest.files if names is None else names)
    for name in chosen:
        check_size(directory, manifest, name)
    threads = len(os.sched_getaffinity(0))
    for name in chosen:
        path = directory / name
        try:
            if name in mapped:
                found = digest_mapped(mapped[name], threads)
            else:
                with open(open_regular(path), "rb", buffering=0) as file:
                    found = digest_open(file.fileno(), threads)
        except OSError as error:
            raise XllmError("io", f"cannot read {name}: {error.strerror}", where=str(path)) from None
        check_digest(directory, manifest, name, found)


def check_digest(directory: Path, manifest: Manifest, name: str, found: str) -> None:
    """Check a digest against that of the manifest."""
    wanted = manifest.files[name].xxh3_128
    if found != wanted:
        raise XllmError(
            "artifact",
            f"{name} is damaged: its digest is {found}, not {wanted}",
            where=str(directory / name),
            help=_AGAIN,
        )


def check_size(directory: Path, manifest: Manifest, name: str) -> None:
    """Check that file `name` is there and has the size that the manifest gives; the cheap half of `check_files`."""
    path = directory / name
    entry = manifest.files.get(name)
    if entry is None:
        raise XllmError("artifact", f"the manifest lists no file {name}", where=str(directory), help=_AGAIN)
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise XllmError("artifact", f"{name} is missing", where=str(path), help=_AGAIN) from None
    except OSError as error:
        raise XllmError("io", f"cannot read {name}: {error.strerror}", where=str(path)) from None
    if not stat.S_ISREG(found.st_mode):
        raise XllmError("artifact", f"{name} is not a file", where=str(path), help=_AGAIN)
    if found.st_size != entry.bytes:
        size = "truncated" if found.st_size < entry.bytes else "too long"
        raise XllmError(
            "artifact", f"{name} is {size}: {found.st_size} bytes, not {entry.bytes}", where=str(path), help=_AGAIN
        )


def is_artifact(directory: Path) -> bool:
    """Whether a directory claims to be an artifact: cheap, no promise that it is a sound one."""
    return os.path.isfile(directory / MANIFEST)


def _no_artifact(directory: Path) -> XllmError:
    if os.path.isfile(directory / "config.json"):
        help_ = f"this looks like a checkpoint; compile it first: xllm-compile {directory} -o OUT"
    else:
        help_ = "an artifact is a directory that xllm-compile wrote"
    what = f"there is no {MANIFEST}" if os.path.isdir(directory) else "there is no such directory"
    return XllmError("artifact", f"not an artifact: {what}", where=str(directory), help=help_)
