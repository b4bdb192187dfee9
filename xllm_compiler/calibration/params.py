"""Weights that calibration rounded, as parameters of the module: each is a file, and mapped when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from xllm_compiler.ir.semantics import Array


class RoundedParams(Mapping[str, Array]):
    """The parameters `base`, and those that were added since, whose values lie in files below `folder`."""

    def __init__(self, base: Mapping[str, Array], folder: Path) -> None:
        self._base = base
        self._folder = folder
        self._files: dict[str, Path] = {}

    def create(self, name: str, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> Array:
        """A new parameter's array, to be filled: what is written to it is in its file."""
        path = self._folder / f"rounded-{len(self._files)}.npy"
        self._files[name] = path
        return np.lib.format.open_memmap(path, "w+", dtype, shape)

    def __getitem__(self, name: str) -> Array:
        path = self._files.get(name)
        return self._base[name] if path is None else np.asarray(np.load(path, mmap_mode="r"))

    def __contains__(self, name: object) -> bool:
        return name in self._files or name in self._base

    def __iter__(self) -> Iterator[str]:
        yield from self._base
        yield from self._files

    def __len__(self) -> int:
        return len(self._base) + len(self._files)
