"""The weights of an artifact as the interpreter wants them: its functions' weight expressions become plain parameters
whose values come from weights.bin. Owns the way back from packed layouts.

A quantized weight is one stored tensor and several values of a function: its integers, scales, and zero points if any.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xllm_compiler.analysis.weights import weight_exprs
from xllm_compiler.artifact import WEIGHTS, Manifest, Weight
from xllm_compiler.errors import XllmError
from xllm_compiler.ir.core import Builder, Func, Module, Op, Value
from xllm_compiler.ir.ops import Dequantize, Param, QuantLinear, QuantLinearGlu
from xllm_compiler.ir.semantics import NP_DTYPE
from xllm_compiler.ir.types import Tensor
from xllm_compiler.kernels import layouts
from xllm_compiler.lowering.weight_requests import WeightTable
from xllm_compiler.weight_formats import Layout

Array = NDArray[Any]


@dataclass(frozen=True)
class Wanted:
    """A parameter of a function: what it is of a stored tensor. `part`: of a quantized one, 0 the integers, 1 the
    scales, 2 the zero points; `whole`: the shape of the tensor that is stored."""

    weight: Weight
    type: Tensor
    part: int
    whole: tuple[int, ...]


class PackedWeights(Mapping[str, Array]):
    """Parameter name -> array, unpacked when asked for."""

    def __init__(self, path: Path, wanted: Mapping[str, Wanted]) -> None:
        self._path = path
        self._wanted = dict(wanted)

    def __iter__(self) -> Iterator[str]:
        return iter(self._wanted)

    def __len__(self) -> int:
        return len(self._wanted)

    def __getitem__(self, name: str) -> Array:
        wanted = self._wanted[name]
        weight = wanted.weight
        try:
            data = np.fromfile(self._path, np.uint8, weight.bytes, offset=weight.offset)
        except OSError as error:
            raise XllmError("io", f"cannot read {WEIGHTS}: {error.strerror}", where=str(self._path)) from None
        return unpack(weight, data, wanted.whole, wanted.part).astype(NP_DTYPE[wanted.type.dtype], copy=False)


def bind_weights(module: Module, directory: Path, manifest: Manifest) -> PackedWeights:
    """Replace each weight expression that weights.bin holds by a `param`, and drop what only it needed. Changes
    `module`; returns the values of its parameters."""
    stored = {weight.name: weight for weight in manifest.weights.tensors}
    wanted: dict[str, Wanted] = {}
    for func in module.funcs.values():
        wanted.update(_bind(func, stored))
    return PackedWeights(directory / WEIGHTS, wanted)


def _bind(func: Func, stored: Mapping[str, Weight]) -> dict[str, Wanted]:
    """The parameters that now stand in `func` for what is stored."""
    known = weight_exprs(func)
    table = WeightTable()
    # Everything is named before anything is replaced: names say what an expression is made of.
    parts: dict[Value, tuple[str, int, Value]] = {}  # value -> the stored tensor, which part of it, its integers
    for op in func.ops:
        for value in op.results:
            if value in known and (name := table.name(value)) in stored and not _quantized(stored[name]):
                parts[value] = (name, 0, value)
        for i, value in enumerate(_form(op)):
            if (name := table.name(_form(op)[0])) in stored and _quantized(stored[name]):
                parts[value] = (name, i, _form(op)[0])
    wanted: dict[str, Wanted] = {}
    for value, (name, part, whole) in parts.items():
        assert value.op is not None
        called = f"{name}{('', ':scales', ':zeros')[part]}"
        param = Builder.before(value.op).create(Param, name=called, type=value.tensor).result
        value.replace_all_uses_with(param)
        wanted[called] = Wanted(stored[name], value.tensor, part, tuple(dim.value for dim in whole.shape))
    for op in reversed(list(func.ops)):
        if op.SPEC.pure and not any(result.has_uses for result in op.results) and op.results:
            op.erase()
    return wanted


def _form(op: Op) -> tuple[Value, ...]:
    """The quantized weight that an op reads."""
    if not isinstance(op, (Dequantize, QuantLinear, QuantLinearGlu)):
        return ()
    return (op.values, op.scales) if op.zeros is None else (op.values, op.scales, op.zeros)


def _quantized(weight: Weight) -> bool:
    return Layout.parse(weight.layout).format is not None


def unpack(weight: Weight, data: NDArray[np.uint8], shape: tuple[int, ...], part: int = 0) -> Array:
    """The tensor of `shape` that is packed in `data`; of a quantized one its integers, scales or zero points."""
    packed = data.view(NP_DTYPE[weight.dtype]).reshape(weight.shape)
    return layouts.unpack(Layout.parse(weight.layout), packed, shape)[part]
