"""From a directory to code and weights in memory. Owns when what is checked; must not run anything.

Everything small, native code above all, is checked before it is used. The weights are mapped at once and checked in a
thread meanwhile; `LoadedArtifact.wait_checked` must return before anyone is told a token that came of them.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from xllm_compiler.artifact import WEIGHTS, Manifest, check_files, check_size, choose_isa, machine_isas, read_manifest
from xllm_compiler.errors import XllmError
from xllm_compiler.runtime import host
from xllm_compiler.runtime.cpu.team import load_library


class LoadedArtifact:
    """A checked manifest, the native code for this machine, and the weights mapped read-only.

    `weights` is weights.bin as bytes; it stays valid as long as it is referred to.
    """

    def __init__(self, path: Path, manifest: Manifest, isa: str) -> None:
        """Use `load_artifact`."""
        self.path = path
        self.manifest = manifest
        self.isa = isa
        self.code: ctypes.CDLL = load_library(path / manifest.target.kind / f"{isa}.so")
        self._map, self.weights = _map_weights(path / WEIGHTS)
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
            mapped = {} if self._map is None else {WEIGHTS: self._map}
            check_files(self.path, self.manifest, [WEIGHTS], mapped)
        except Exception as error:
            self._error = error


def load_artifact(path: Path, isa: str | None = None) -> LoadedArtifact:
    """Load an artifact for this machine; `isa` forces one of its instruction sets.

    Raises XllmError: "artifact" when it is damaged, of another version or for another machine, "option" when `isa`
    cannot run here, "io" when it cannot be read.
    """
    manifest = read_manifest(path)
    if manifest.target.kind != "cpu":
        raise XllmError("artifact", f"the artifact is for {manifest.target.kind}, and this runtime is for cpu")
    if isa is None:
        isa = choose_isa(manifest.target.isas)
    elif isa not in manifest.target.isas or isa not in machine_isas():
        here = [name for name in machine_isas() if name in manifest.target.isas]
        offered = ", ".join(here) or "none"
        raise XllmError(
            "option", f"instruction set {isa!r} cannot run here", help=f"this artifact and machine: {offered}"
        )
    check_files(path, manifest, [name for name in manifest.files if name != WEIGHTS])
    check_size(path, manifest, WEIGHTS)
    return LoadedArtifact(path, manifest, isa)


def _map_weights(path: Path) -> tuple[mmap.mmap | None, NDArray[np.uint8]]:
    try:
        with open(path, "rb") as file:
            if path.stat().st_size == 0:
                return None, np.empty(0, np.uint8)
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        host.prefer_huge_pages(mapped)
    except OSError as error:
        raise XllmError("io", f"cannot map the weights: {error.strerror}", where=str(path)) from None
    return mapped, np.frombuffer(mapped, np.uint8)
