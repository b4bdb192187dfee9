"""The weights of an artifact as the interpreter wants them: its step's weight expressions become plain parameters whose
values come from weights.bin. Owns the way back from packed layouts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xllm_compiler.analysis.weights import weight_exprs
from xllm_compiler.artifact import WEIGHTS, Manifest, Weight
from xllm_compiler.errors import XllmError
from xllm_compiler.ir.core import Builder, Module
from xllm_compiler.ir.ops import Param
from xllm_compiler.ir.semantics import NP_DTYPE
from xllm_compiler.ir.types import Tensor
from xllm_compiler.kernels.layouts import GLU_HALF, glu_rows, unpack_panels
from xllm_compiler.lowering.weights import WeightTable

Array = NDArray[Any]


class PackedWeights(Mapping[str, Array]):
    """Parameter name -> array, unpacked when asked for. `wanted`: the stored tensor and the parameter's type."""

    def __init__(self, path: Path, wanted: Mapping[str, tuple[Weight, Tensor]]) -> None:
        self._path = path
        self._wanted = dict(wanted)

    def __iter__(self) -> Iterator[str]:
        return iter(self._wanted)

    def __len__(self) -> int:
        return len(self._wanted)

    def __getitem__(self, name: str) -> Array:
        weight, type_ = self._wanted[name]
        try:
            data = np.fromfile(self._path, np.uint8, weight.bytes, offset=weight.offset)
        except OSError as error:
            raise XllmError("io", f"cannot read {WEIGHTS}: {error.strerror}", where=str(self._path)) from None
        shape = tuple(dim.value for dim in type_.shape)
        return unpack(weight, data, shape).astype(NP_DTYPE[type_.dtype], copy=False)


def bind_weights(module: Module, directory: Path, manifest: Manifest) -> PackedWeights:
    """Replace each weight expression of @step that weights.bin holds by a `param`, and drop what only it needed.
    Changes `module`; returns the values of its parameters."""
    func = module.func("step")
    stored = {weight.name: weight for weight in manifest.weights.tensors}
    known = weight_exprs(func)
    wanted: dict[str, tuple[Weight, Tensor]] = {}
    table = WeightTable()
    for op in list(func.ops):
        for value in op.results:
            if value not in known:
                continue
            name = table.name(value)
            if name in stored:
                builder = Builder.before(op)
                param = builder.create(Param, name=name, type=value.tensor).result
                value.replace_all_uses_with(param)
                wanted[name] = (stored[name], value.tensor)
    for op in reversed(list(func.ops)):
        if op.SPEC.pure and not any(result.has_uses for result in op.results) and op.results:
            op.erase()
    return PackedWeights(directory / WEIGHTS, wanted)


def unpack(weight: Weight, data: NDArray[np.uint8], shape: tuple[int, ...]) -> Array:
    """The tensor of `shape` that is packed in `data`."""
    packed = data.view(NP_DTYPE[weight.dtype]).reshape(weight.shape)
    if weight.layout == "row":
        return packed.reshape(shape)
    out, in_ = shape
    if weight.layout == "panel":
        return unpack_panels(packed, out, in_)
    mixed = unpack_panels(packed, glu_rows(out // 2), in_)
    halves = mixed.reshape(-1, 2, GLU_HALF, in_).transpose(1, 0, 2, 3).reshape(2, -1, in_)
    return np.ascontiguousarray(halves[:, : out // 2].reshape(out, in_))
