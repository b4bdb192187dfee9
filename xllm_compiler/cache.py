"""The compile cache: artifacts in a directory, found by what their compile really read. Owns keys, lookup, locking and
the clearing of damage; must not know how an artifact is made.

Layout: `<root>/<hash>/` is an entry (an artifact), `<root>/locks/<hash>.lock` the lock of its makers. Nothing else is
kept: an entry's key is in its manifest.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xllm_compiler.artifact import Manifest, check_files, is_artifact, read_manifest
from xllm_compiler.artifact.schema import canonical_json
from xllm_compiler.artifact.writer import leftover_name, output_error, remove_leftovers
from xllm_compiler.errors import XllmError

GROUPS = ("checkpoint", "option", "pipeline", "source", "version")
"""First parts of factor names, in the order in which a difference is worth telling."""


_ELSEWHERE = "name another cache with --cache-dir or XLLM_CACHE_DIR, or write the artifact somewhere with -o"


class Factors:
    """Everything that might decide what a compile makes, by name ("option.dtype"), with a record of what was read.

    Only factors that were read enter the artifact's key, so a change to any other does not cost a compile."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = dict(values)
        self._read: set[str] = set()

    def read(self, name: str) -> Any:
        """The value of a factor, which from now on is part of the key. KeyError for an undeclared name: a value that is
        used but not declared could not be compared later."""
        value = self._values[name]
        self._read.add(name)
        return value

    def read_group(self, group: str) -> dict[str, Any]:
        """All factors of a group, read."""
        return {name: self.read(name) for name in sorted(self._values) if name.split(".", 1)[0] == group}

    @property
    def values(self) -> dict[str, Any]:
        """Every declared factor; looking here records nothing."""
        return dict(self._values)

    def key(self) -> dict[str, Any]:
        """What was read so far."""
        return {name: self._values[name] for name in sorted(self._read)}

    def hash(self) -> str:
        """Names the cache entry and the lock of this request."""
        return hashlib.sha256(canonical_json(self._values).encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Difference:
    """One factor by which a request and an entry's key differ; `None` where one side has no such factor."""

    factor: str
    wanted: Any
    found: Any


@dataclass(frozen=True, slots=True)
class Entry:
    """A readable cache entry, and how it differs from a request (not at all: it will do)."""

    path: Path
    manifest: Manifest
    differences: tuple[Difference, ...]


def differences(wanted: Mapping[str, Any], key: Mapping[str, Any]) -> tuple[Difference, ...]:
    """How a request's factors differ from those that an entry's compile read; the ones it did not read do not count."""
    found = [
        Difference(name, wanted.get(name), value)
        for name, value in key.items()
        if name not in wanted or wanted[name] != value
    ]
    return tuple(sorted(found, key=lambda d: (_rank(d.factor), d.factor)))


class CompileCache:
    """The cache at `root`, which is made when first needed. Any number of processes may use it at once."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    def entries(self, factors: Factors) -> list[Entry]:
        """All readable entries, nearest to the request first. Damaged and foreign ones are left out."""
        found = []
        for path in self._entry_paths(factors):
            try:
                manifest = read_manifest(path)
            except XllmError:
                continue
            found.append(Entry(path, manifest, differences(factors.values, manifest.key)))
        return sorted(found, key=lambda entry: (len(entry.differences), entry.path.name))

    def find(self, factors: Factors) -> Entry | None:
        """The entry that serves the request, if any, with every byte checked."""
        return self._look(factors)[0]

    def obtain(
        self, factors: Factors, make: Callable[[Path], object], note: Callable[[str], None] = lambda text: None
    ) -> tuple[Path, bool]:
        """The entry for a request and whether `make(path)` had to publish it (with ArtifactWriter, at `path`).

        Processes that want the same thing at once make it once; the others wait. The lock is flock's, so it dies with
        its owner: a killed compile never blocks the next, which also removes its leftovers. An entry found damaged is
        taken out of the way and made again. One that is there and sound needs neither lock nor a cache that can be
        written. Raises what `make` raises, and kind "io"."""
        entry, _ = self._look(factors)
        if entry is not None:
            return entry.path, False
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            (self.root / "locks").mkdir(exist_ok=True)
        except OSError as error:
            raise _unwritable(error, self.root) from None
        with self._locked(factors.hash(), note):
            entry, damage = self._look(factors)
            if entry is not None:
                return entry.path, False
            for path, why in damage:
                note(f"cache entry {path.name} is damaged and will be made again: {why}")
                self._discard(path)
            remove_leftovers(self.root)
            path = self.root / factors.hash()
            if path.exists():
                note(f"cache entry {path.name} cannot be read and will be made again")
                self._discard(path)
            make(path)
            return path, True

    def _look(self, factors: Factors) -> tuple[Entry | None, list[tuple[Path, str]]]:
        """The entry that serves the request, checked, and those that would but are damaged, with the reason."""
        damaged: list[tuple[Path, str]] = []
        for path in self._entry_paths(factors):
            try:
                manifest = read_manifest(path)
            except XllmError:
                continue
            if differences(factors.values, manifest.key):
                continue
            try:
                check_files(path, manifest)
            except XllmError as error:
                damaged.append((path, error.message))
            else:
                return Entry(path, manifest, ()), damaged
        return None, damaged

    def _entry_paths(self, factors: Factors) -> list[Path]:
        """Directories that claim to be entries; the one that has the request's own name comes first."""
        own = factors.hash()
        try:
            names = sorted(os.listdir(self.root), key=lambda name: (name != own, name))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise XllmError(
                "io", f"cannot read the cache: {error.strerror}", where=str(self.root), help=_ELSEWHERE
            ) from None
        return [self.root / name for name in names if not name.startswith(".") and is_artifact(self.root / name)]

    def _discard(self, path: Path) -> None:
        """Take an entry out of sight in one step, then delete it; killed in between, it is one more leftover."""
        aside = path.parent / leftover_name(path.name)
        try:
            os.rename(path, aside)
        except FileNotFoundError:
            return  # another request's maker was quicker
        except OSError as error:
            raise _unwritable(error, path) from None
        shutil.rmtree(aside, ignore_errors=True)

    @contextmanager
    def _locked(self, name: str, note: Callable[[str], None]) -> Iterator[None]:
        path = self.root / "locks" / f"{name}.lock"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise _unwritable(error, self.root) from None
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                note("another process compiles the same; waiting for it")
                fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)


def _unwritable(error: OSError, where: Path) -> XllmError:
    """The cache has no entry for the request and cannot be given one."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return output_error(error, where)
    return XllmError(
        "io",
        f"the cache cannot be written, and the artifact is not in it: {error.strerror or error}",
        where=str(where),
        help=_ELSEWHERE,
    )


def _rank(factor: str) -> int:
    group = factor.split(".", 1)[0]
    return GROUPS.index(group) if group in GROUPS else len(GROUPS)
