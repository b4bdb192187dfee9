"""The small files of an artifact as they were when they were checked. Owns the rule that nothing is read which the
manifest does not list; must not know what the files mean.

Each read is of the whole file, and what is returned are the very bytes that were compared with the digest: a change of
the file afterwards changes nothing.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from xllm_compiler.artifact.digest import digest_bytes
from xllm_compiler.artifact.io import check_digest, check_size, read_regular
from xllm_compiler.artifact.schema import MANIFEST, Manifest
from xllm_compiler.errors import XllmError

_SHOWN: Final = 8  # names in a warning
_SEEN: Final = 10_000  # entries of a directory that are looked at


@dataclass(frozen=True, slots=True)
class Contents:
    """The folder of an artifact, or a file in it; behaves like a `pathlib.Path` that may be read. A file that the
    manifest does not list is not there."""

    directory: Path
    manifest: Manifest
    name: str = ""

    def __truediv__(self, name: str) -> Contents:
        return Contents(self.directory, self.manifest, f"{self.name}/{name}" if self.name else name)

    def __str__(self) -> str:
        return str(self.directory / self.name)

    def is_file(self) -> bool:
        """Whether the manifest lists it."""
        return self.name in self.manifest.files

    def read_bytes(self) -> bytes:
        """The checked bytes. Raises FileNotFoundError where the manifest lists none, and kinds "artifact" and "io"."""
        if not self.is_file():
            raise FileNotFoundError(2, os.strerror(2), str(self))
        path = self.directory / self.name
        check_size(self.directory, self.manifest, self.name)
        try:
            data = read_regular(path, self.manifest.files[self.name].bytes)
        except OSError as error:
            raise XllmError("io", f"cannot read {self.name}: {error.strerror}", where=str(path)) from None
        check_digest(self.directory, self.manifest, self.name, digest_bytes(data))
        return data

    def read_text(self, encoding: str = "utf-8") -> str:
        """The checked text. Raises also UnicodeDecodeError."""
        return self.read_bytes().decode(encoding)


def unlisted(directory: Path, manifest: Manifest) -> list[str]:
    """Names of what lies in the directory of an artifact and is no part of it, shortened to a few. Never raises for
    what cannot be looked at."""
    known = {MANIFEST, *manifest.files}
    found: list[str] = []
    folders, seen = [""], 0
    while folders and seen < _SEEN:
        folder = folders.pop()
        try:
            entries = sorted(os.scandir(directory / folder), key=lambda entry: entry.name)
        except OSError:
            continue
        for entry in entries:
            seen += 1
            name = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_dir(follow_symlinks=False):
                folders.append(name)
            elif name not in known:
                found.append(name)
    return found if len(found) <= _SHOWN else [*found[:_SHOWN], f"{len(found) - _SHOWN} more"]
