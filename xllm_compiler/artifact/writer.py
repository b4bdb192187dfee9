"""Writing an artifact directory all at once or not at all. Owns the temporary sibling, the replacement of an older
artifact and the clearing of what killed writers left; must not know how the files are made."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import secrets
import shutil
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from xllm_compiler.artifact.digest import digest_file
from xllm_compiler.artifact.io import is_artifact, read_manifest
from xllm_compiler.artifact.rules import validate
from xllm_compiler.artifact.schema import MANIFEST, FileEntry, Manifest
from xllm_compiler.errors import XllmError

LEFTOVER = ".xllm-tmp-"
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EXDEV, errno.EOPNOTSUPP)


class ArtifactWriter:
    """`with ArtifactWriter(out) as writer:` write files below `writer.path`, then `writer.commit(manifest)`.

    Readers of `out` see the old state or the whole new one. Without a commit nothing is left. What is written goes into
    a sibling of `out`, locked with flock for as long as its process lives; a later writer to the same `out` removes
    those whose lock is free. `work` is a directory there too, for whatever else the making of an artifact writes, so
    that a kill leaves nothing elsewhere. `out` may be absent, an empty directory, or an artifact that holds nothing but
    the files of its manifest, which is then replaced. Raises kind "io" when the disk is full or `out` is not writable.
    """

    def __init__(self, out: Path) -> None:
        self.out = out.resolve()
        self._lock = -1
        self._scratch: Path | None = None

    @property
    def path(self) -> Path:
        """The directory to write into: what `out` becomes."""
        return self._locked / "artifact"

    @property
    def work(self) -> Path:
        """A directory for temporary files, gone with the writer."""
        return self._locked / "work"

    @property
    def _locked(self) -> Path:
        if self._scratch is None:
            raise RuntimeError("ArtifactWriter is used outside its `with` block")
        return self._scratch

    def __enter__(self) -> ArtifactWriter:
        self._check_replaceable()
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.out.parent, self.out.name)
            self._scratch, self._lock = _make_locked(self.out)
            self.path.mkdir()
            self.work.mkdir()
        except OSError as error:
            self._clear()
            raise output_error(error, self.out) from None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._clear()
        if isinstance(error, OSError) and self._is_ours(error):
            raise output_error(error, self.out) from error

    def _clear(self) -> None:
        """Remove what is temporary, an artifact that was replaced too, and let go of the lock."""
        try:
            if self._scratch is not None:
                shutil.rmtree(self._scratch, ignore_errors=True)
        finally:
            if self._lock >= 0:
                os.close(self._lock)
                self._lock = -1

    def write_text(self, name: str, text: str) -> None:
        """Write a text file, UTF-8, at the relative path `name`."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="")

    def copy(self, name: str, source: Path) -> None:
        """Copy the content (not the mode or times) of `source` to the relative path `name`."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, path)

    def commit(self, manifest: Manifest) -> Manifest:
        """Seal and publish: fill in `files` and `id`, validate, flush to disk, rename. Returns the sealed manifest."""
        try:
            sealed = replace(manifest, files=self._entries()).with_id()
            validate(sealed)
            self.write_text(MANIFEST, sealed.to_json())
            _sync_tree(self.path)
            self._check_replaceable()
            _publish(self.path, self.out, self._locked / "replaced")
        except OSError as error:
            raise output_error(error, self.out) from error
        return sealed

    def _entries(self) -> dict[str, FileEntry]:
        entries: dict[str, FileEntry] = {}
        threads = len(os.sched_getaffinity(0))
        for path in sorted(self.path.rglob("*")):
            if path.is_file():
                name = path.relative_to(self.path).as_posix()
                entries[name] = FileEntry(bytes=path.stat().st_size, xxh3_128=digest_file(path, threads))
        return entries

    def _check_replaceable(self) -> None:
        """Refuse to delete what no artifact writer made."""
        try:
            if not self.out.exists():
                return
            if not self.out.is_dir():
                raise _refuse(self.out, "the output is not a directory")
            present = sorted(p.relative_to(self.out).as_posix() for p in self.out.rglob("*") if not p.is_dir())
        except OSError as error:
            raise output_error(error, self.out) from None
        if not present:
            return
        if not is_artifact(self.out):
            raise _refuse(self.out, f"the output directory exists and is not an artifact: it holds {present[0]}")
        try:
            known = {MANIFEST, *read_manifest(self.out).files}
        except XllmError as error:
            raise _refuse(
                self.out, f"the output directory holds an artifact that cannot be read: {error.message}"
            ) from None
        foreign = [name for name in present if name not in known]
        if foreign:
            raise _refuse(self.out, f"the output directory holds {foreign[0]}, which is no part of the artifact there")

    def _is_ours(self, error: OSError) -> bool:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            return True
        names = [name for name in (error.filename, error.filename2) if isinstance(name, str | os.PathLike)]
        return any(self._scratch is not None and Path(name).is_relative_to(self._scratch) for name in names)


def output_error(error: OSError, out: Path) -> XllmError:
    """The typed error for a directory that cannot be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return XllmError(
            "io",
            "no space is left for the artifact",
            where=str(out),
            help="free some space or choose another directory",
        )
    reason = error.strerror or str(error)
    return XllmError(
        "io", f"cannot write the artifact: {reason}", where=str(out), help="choose another output directory"
    )


def leftover_name(name: str) -> str:
    """A fresh name for something beside `name` that anyone may remove once nobody holds its lock."""
    return f".{name}{LEFTOVER}{secrets.token_hex(6)}"


def remove_leftovers(parent: Path, name: str | None = None) -> list[Path]:
    """Remove what killed writers to `parent / name` (to anything in `parent` when None) left; returns their
    paths. A directory whose writer lives is locked and stays."""
    removed = []
    for path in sorted(parent.iterdir()):
        owner, mark, _ = path.name.rpartition(LEFTOVER)
        if not mark or not owner.startswith(".") or (name is not None and owner != f".{name}"):
            continue
        lock = _try_lock(path)
        if lock >= 0:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)
            removed.append(path)
    return removed


def _make_locked(out: Path) -> tuple[Path, int]:
    """A fresh locked directory. Between mkdir and flock a cleaner may take it for a leftover; then try another."""
    while True:
        path = out.parent / leftover_name(out.name)
        path.mkdir()
        lock = _try_lock(path)
        if lock >= 0:
            return path, lock


def _try_lock(path: Path) -> int:
    """A descriptor that holds the lock of directory `path`, or -1 when it is taken or the directory is gone."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return -1
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.stat(path).st_ino == os.fstat(fd).st_ino:
            return fd
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(fd)
    return -1


def _sync_tree(root: Path) -> None:
    for path in [*root.rglob("*"), root]:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _publish(new: Path, out: Path, aside: Path) -> None:
    """Rename `new` to `out`. An artifact that was there is afterwards at `new` or at `aside`."""
    if out.exists() and any(out.iterdir()):
        _swap(new, out, aside)
    else:
        os.rename(new, out)
    fd = os.open(out.parent, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _swap(new: Path, out: Path, aside: Path) -> None:
    """Exchange two directories in one step where the file system can; else move the old one aside first, which leaves
    an instant in which `out` is absent."""
    libc = ctypes.CDLL(None, use_errno=True)
    code = libc.renameat2(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(out), _RENAME_EXCHANGE)
    if code == 0:
        return
    number = ctypes.get_errno()
    if number not in _NO_EXCHANGE:
        raise OSError(number, os.strerror(number), str(out))
    os.rename(out, aside)
    try:
        os.rename(new, out)
    except OSError:
        os.rename(aside, out)
        raise


def _refuse(out: Path, message: str) -> XllmError:
    return XllmError("io", message, where=str(out), help="choose another output directory, or remove this one first")
