"""Which reader a linear kernel uses for its weight: `reader`.

A new weight format needs an entry here if 8-bit activations are multiplied by it, and one in stored_values.py if others
are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from xllm_compiler.errors import XllmError
from xllm_compiler.kernels.tir.linear.dense import Dense
from xllm_compiler.kernels.tir.linear.grid import Grids
from xllm_compiler.kernels.tir.linear.integer import Integers
from xllm_compiler.kernels.tir.linear.reader import WeightReader, parse_weights
from xllm_compiler.kernels.tir.linear.weight_only import WeightOnly
from xllm_compiler.weight_formats import GridFormat, IntegerFormat, WeightFormat, parse_format

_BY_BYTES: Final[dict[type[WeightFormat], Callable[[Any], WeightReader]]] = {
    IntegerFormat: Integers,
    GridFormat: Grids,
}


def reader(dtype: str, weights: str) -> WeightReader:
    """The reader of a kernel in `dtype` whose weight is stored as `weights` says.

    "": in `dtype`. "q8": in that format, with 8-bit activations. "wq8": in that format, with activations in `dtype`.
    Raises kind "unsupported"."""
    if not weights:
        return Dense(dtype)
    name, by_bytes = parse_weights(weights)
    format = parse_format(name)
    if not by_bytes:
        return WeightOnly(dtype, format)
    if type(format) not in _BY_BYTES:
        raise XllmError("unsupported", f"no kernel multiplies {format} by 8-bit activations")
    return _BY_BYTES[type(format)](format)
