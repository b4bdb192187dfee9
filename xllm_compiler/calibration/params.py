"""Weights that calibration rounded, as parameters of the module: each is a file, and mapped when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from xllm_compiler.ir.semantics import NP_DTYPE, Array
from xllm_compiler.ir.types import Tensor


@dataclass(frozen=True)
class _File:
    """A tensor of fixed size, as bytes in a file."""

    path: Path
    tensor: Tensor

    def map(self) -> Array:
        shape = tuple(dim.value for dim in self.tensor.shape)
        return np.asarray(np.memmap(self.path, NP_DTYPE[self.tensor.dtype], "r", shape=shape))


class RoundedParams(Mapping[str, Array]):
    """The parameters `base`, and those that were added since, whose values lie in files below `folder`."""

    def __init__(self, base: Mapping[str, Array], folder: Path) -> None:
        self._base = base
        self._folder = folder
        self._files: dict[str, _File] = {}

    def create(self, name: str, tensor: Tensor) -> BinaryIO:
        """The file of a new parameter, for its rows to be written to one after the other. It is not written through a
        mapping, since a full disk would then be a signal instead of an error."""
        made = _File(self._folder / f"rounded-{len(self._files)}", tensor)
        self._files[name] = made
        return made.path.open("wb")

    def __getitem__(self, name: str) -> Array:
        file = self._files.get(name)
        return self._base[name] if file is None else file.map()

    def __contains__(self, name: object) -> bool:
        return name in self._files or name in self._base

    def __iter__(self) -> Iterator[str]:
        yield from self._base
        yield from self._files

    def __len__(self) -> int:
        return len(self._base) + len(self._files)
