"""Reading an artifact directory and proving that it is whole. Owns what a reader needs; writing is `writer`."""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

from xllm_compiler.artifact.digest import digest_file, digest_mapped
from xllm_compiler.artifact.schema import MANIFEST, Manifest
from xllm_compiler.errors import XllmError

_MANIFEST_LIMIT = 64 << 20  # bytes; a manifest has a line per weight, so a few megabytes are already absurd
_AGAIN = "copy the artifact again or compile the checkpoint again"


def read_manifest(directory: Path) -> Manifest:
    """The validated manifest of the artifact at `directory`. Raises kind "artifact" when there is none, when it is of
    another format version or damaged, and kind "io" when it cannot be read."""
    path = directory / MANIFEST
    try:
        with open(path, "rb") as file:
            data = file.read(_MANIFEST_LIMIT + 1)
    except FileNotFoundError:
        raise _no_artifact(directory) from None
    except OSError as error:
        if not directory.is_dir():
            raise _no_artifact(directory) from None
        raise XllmError("io", f"cannot read {MANIFEST}: {error.strerror}", where=str(path)) from None
    try:
        if len(data) > _MANIFEST_LIMIT:
            raise XllmError("artifact", f"{MANIFEST} has more than {_MANIFEST_LIMIT} bytes", help=_AGAIN)
        return Manifest.from_json(data.decode())
    except UnicodeDecodeError as error:
        raise XllmError("artifact", f"{MANIFEST} is not UTF-8: {error}", where=str(path), help=_AGAIN) from None
    except XllmError as error:
        where = f"{path}: {error.where}" if error.where else str(path)
        raise XllmError(error.kind, error.message, where=where, help=error.help) from None


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
            found = digest_mapped(mapped[name], threads) if name in mapped else digest_file(path, threads)
        except OSError as error:
            raise XllmError("io", f"cannot read {name}: {error.strerror}", where=str(path)) from None
        if found != manifest.files[name].xxh3_128:
            raise XllmError(
                "artifact",
                f"{name} is damaged: its digest is {found}, not {manifest.files[name].xxh3_128}",
                where=str(path),
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
    return (directory / MANIFEST).is_file()


def _no_artifact(directory: Path) -> XllmError:
    if (directory / "config.json").is_file():
        help_ = f"this looks like a checkpoint; compile it first: xllm-compile {directory} -o OUT"
    else:
        help_ = "an artifact is a directory that xllm-compile wrote"
    what = f"there is no {MANIFEST}" if directory.is_dir() else "there is no such directory"
    return XllmError("artifact", f"not an artifact: {what}", where=str(directory), help=help_)
