"""From a directory to code and weights in memory. Owns when what is checked; must not run anything.

Everything small is read once and checked before it is used, native code too, which is loaded from a copy in memory:
what becomes of these files afterwards changes nothing. The weights are mapped at once and checked in a thread
meanwhile; `LoadedArtifact.wait_checked` must return before anyone is told a token that came of them. `guard` watches
over them from then on.
"""

from __future__ import annotations

import logging
import mmap
import os
import threading
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from xllm_compiler.artifact import (
    MODULE,
    WEIGHTS,
    Contents,
    Manifest,
    check_files,
    check_size,
    read_manifest,
    unlisted,
)
from xllm_compiler.artifact.io import open_regular
from xllm_compiler.artifact.module_text import check_module
from xllm_compiler.errors import XllmError
from xllm_compiler.runtime import host
from xllm_compiler.runtime.executor import check_functions
from xllm_compiler.runtime.guard import WeightsGuard
from xllm_compiler.runtime.targets import RuntimeTarget, choose_level, runtime_target

log = logging.getLogger("xllm")


class LoadedArtifact:
    """A checked manifest, the code for this machine, and the weights mapped read-only.

    `weights` is weights.bin as bytes; it stays valid as long as it is referred to. `files`: the others, as listed.
    """

    def __init__(self, path: Path, manifest: Manifest, target: RuntimeTarget, level: str) -> None:
        """Use `load_artifact`."""
        self.path = path
        self.manifest = manifest
        self.level = level
        self.files = Contents(path, manifest)
        check_functions(manifest)
        check_module((self.files / MODULE).read_bytes(), manifest)
        self.code = target.load(self.files, manifest, level)
        fd, self._map, self.weights = _map_weights(path / WEIGHTS)
        self.guard = WeightsGuard(path / WEIGHTS, fd, self._map, int(self.weights.ctypes.data), self._compare)
        self._error: Exception | None = None
        self._check = threading.Thread(target=self._check_weights, name="xllm-check", daemon=True)
        self._check.start()

    def wait_checked(self) -> None:
        """Wait until the weights are known to be whole. Raises XllmError("artifact") or ("io"), again at every call."""
        self._check.join()
        if self._error is not None:
            raise self._error

    def _check_weights(self) -> None:
        try:
            self._compare()
        except Exception as error:
            self._error = error

    def _compare(self) -> None:
        mapped = {} if self._map is None else {WEIGHTS: self._map}
        check_files(self.path, self.manifest, [WEIGHTS], mapped)


def load_artifact(path: Path, level: str | None = None) -> LoadedArtifact:
    """Load an artifact for this machine; `level` forces one of its target's levels (of the CPU, an instruction set).

    Raises XllmError: "artifact" when it is damaged, of another version or for another machine or target, "option" when
    `level` cannot run here, "io" when it cannot be read.
    """
    manifest = read_manifest(path)
    target = runtime_target(manifest)
    level = choose_level(target, manifest, level)
    if extra := unlisted(path, manifest):
        log.warning("%s: not listed in the manifest, and not read: %s", path, ", ".join(map(repr, extra)))
    later = (WEIGHTS, MODULE, *target.reads(level))  # checked when they are read
    check_files(path, manifest, [name for name in manifest.files if name not in later])
    check_size(path, manifest, WEIGHTS)
    return LoadedArtifact(path, manifest, target, level)


def _map_weights(path: Path) -> tuple[int, mmap.mmap | None, NDArray[np.uint8]]:
    """The file, open, and mapped; it may be empty."""
    try:
        fd = open_regular(path)
        if os.fstat(fd).st_size == 0:
            return fd, None, np.empty(0, np.uint8)
        mapped = mmap.mmap(fd, 0, access=mmap.ACCESS_READ)
        host.prefer_huge_pages(mapped)
    except OSError as error:
        raise XllmError("io", f"cannot map the weights: {error.strerror}", where=str(path)) from None
    return fd, mapped, np.frombuffer(mapped, np.uint8)
