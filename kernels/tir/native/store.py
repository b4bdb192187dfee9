"""`ObjectStore`: kernel objects on disk, shared by processes and by compiles.

The key of an object is everything that decides its bytes: the kernel's fields, the level, TVM's version, and those of
our sources that the kernel's class imports, directly or not. So an object is never out of date: if a source changes, it
is not found.

Layout: `<root>/<first two digits>/<digest of the key>.o` is a SHA-256 of the object, then the object. The digest
protects against torn and damaged files, not against an attacker. Whoever can write here decides what code is linked.
"""

from __future__ import annotations

import ast
import hashlib
import os
import tempfile
import time
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Final

import xllm_compiler
from xllm_compiler.kernels.tir.codegen.kernel import Kernel
from xllm_compiler.kernels.tir.isa.levels import Isa

_OURS: Final = "xllm_compiler."
_FOLDER: Final = Path(xllm_compiler.__file__).parent
_GENERATOR: Final = "xllm_compiler.kernels.tir.native.objects"
_DIGEST_BYTES: Final = 32
_UNUSED_SECONDS: Final = 30 * 86_400
"""An object that was not used for so long is removed: kernels change, and their old objects would pile up."""


class ObjectStore:
    """The store at `root`, a directory that the first write makes. Any number of processes may use it at once.

    A store that cannot be read or written costs time only. So its errors are counted in `failures`, not raised, and
    `last_failure` is the last one. `hits` and `misses` count what `get` found and did not find."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.hits = self.misses = self.failures = 0
        self.last_failure = ""
        self._swept = False

    def get(self, kernel: Kernel, isa: Isa) -> bytes | None:
        """The object of `kernel` for level `isa`, or None."""
        path = self._path(kernel, isa)
        if path is None:
            return None
        try:
            with path.open("rb") as file:
                data = file.read()
                if time.time() - os.fstat(file.fileno()).st_mtime > _UNUSED_SECONDS / 4:
                    with suppress(OSError):  # the store may be read-only
                        os.utime(path)
        except FileNotFoundError:
            self.misses += 1
            return None
        except OSError as error:
            self._failed(error)
            return None
        digest, found = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
        if hashlib.sha256(found).digest() != digest:
            self._failed(ValueError(f"{path.name} is damaged"))
            return None
        self.hits += 1
        return found

    def put(self, kernel: Kernel, isa: Isa, data: bytes) -> None:
        """Stores an object. Readers see all of it or nothing."""
        path = self._path(kernel, isa)
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not self._swept:
                self._swept = True
                self._sweep()
            draft, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
            try:
                with os.fdopen(draft, "wb") as file:
                    file.write(hashlib.sha256(data).digest() + data)
                os.replace(name, path)
            except BaseException:
                with suppress(OSError):
                    os.unlink(name)
                raise
        except OSError as error:
            self._failed(error)

    def _path(self, kernel: Kernel, isa: Isa) -> Path | None:
        """The path of a kernel's object; None for a kernel of another package, whose changes would not be noticed."""
        kind = type(kernel)
        if not kind.__module__.startswith(_OURS):
            return None
        key = f"{kind.__module__}.{kind.__qualname__} {kernel!r} {isa!r} {_tvm_version()} {_sources(kind.__module__)}"
        name = hashlib.sha256(key.encode()).hexdigest()
        return self.root / name[:2] / f"{name[2:]}.o"

    def _failed(self, error: Exception) -> None:
        self.failures += 1
        self.last_failure = str(error)

    def _sweep(self) -> None:
        """Removes objects that were not used for a long time, and drafts of killed writers."""
        oldest = time.time() - _UNUSED_SECONDS
        for path in self.root.glob("??/*"):
            with suppress(OSError):
                if path.stat().st_mtime < oldest:
                    path.unlink()


@cache
def _tvm_version() -> str:
    return metadata.version("apache-tvm")


@cache
def _sources(module: str) -> str:
    """A digest of the sources of `module`, of the code generator, and of all modules of ours that they import."""
    reached: dict[str, bytes] = {}
    waiting = [module, _GENERATOR]
    while waiting:
        name = waiting.pop()
        path = _FOLDER.joinpath(*name.removeprefix(_OURS).split("."))
        if path.is_dir():
            path = path / "__init__"
        path = path.with_suffix(".py").resolve()
        if name in reached or not name.startswith(_OURS) or not path.is_file():
            continue
        reached[name] = path.read_bytes()
        waiting += _imports(reached[name])
    digest = hashlib.sha256()
    for name in sorted(reached):
        digest.update(f"{name} {len(reached[name])}\n".encode() + reached[name])
    return digest.hexdigest()


def _imports(text: bytes) -> list[str]:
    """The modules that a source imports, at the top or inside functions. `from a import b` counts as `a` and `a.b`."""
    found: list[str] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found
