"""The numbers that weights may become, chosen group by group while rounding goes on: a case for each weight format.

Weights lie transposed here, [in, out]: an input's weights, which are rounded together, are one run of memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from xllm_compiler.ir import quant
from xllm_compiler.ir.semantics import Array
from xllm_compiler.weight_formats import GridFormat, IntegerFormat, WeightFormat


class Grid(ABC):
    """The grid of the group that is being rounded, for all rows of a weight.

    `stored` u8 [in, out], `scales` [groups, out] and `zeros` u8 [groups, out] (None where the format has none) fill up
    as it goes."""

    stored: Array
    scales: Array
    zeros: Array | None = None
    length: int
    """Inputs that share a grid: a new one begins at each multiple."""

    @abstractmethod
    def begin(self, number: int, w: Array, weights: Array) -> None:
        """Choose the grid of group `number`, whose weights are `w` f32 [inputs, out] by now. `weights` f32 [inputs]:
        what the square of an error counts."""

    @abstractmethod
    def round(self, i: int, w: Array, out: Array) -> None:
        """Round the weights `w` f32 [out] of input `i`; what they stand for goes into `out`, f32."""


class _Integers(Grid):
    """Of an `IntegerFormat`."""

    def __init__(self, format: IntegerFormat, w: Array) -> None:
        in_, out = w.shape
        groups = format.groups(in_)
        self._format = format
        self._dtype = np.dtype(np.float16 if format.group else np.float32)
        self.length = group_length(format, in_)
        self.stored = np.empty((in_, out), np.uint8)
        self.scales = np.empty((groups, out), self._dtype)
        if format.zeros:
            self.zeros = np.empty((groups, out), np.uint8)
        self._work = np.empty(out, np.float32)

    def begin(self, number: int, w: Array, weights: Array) -> None:
        format = self._format
        scale, zero = quant.scales_of_groups(w, 0, format, weights[:, None])
        self.scales[number] = scale[0]
        if self.zeros is not None:
            self.zeros[number] = zero[0]
        self._inverse, self._scale = quant.inverse_of(scale[0])
        self._zero = zero[0]

    def round(self, i: int, w: Array, out: Array) -> None:
        quant.nearest_integers(w, self._inverse, self._zero, self._format, out)
        self.stored[i] = out
        out -= self._zero
        out *= self._scale


class _Runs(Grid):
    """Of a `GridFormat`: the scale of a row is given, and a group is a run with a step and a point."""

    def __init__(self, format: GridFormat, scale: Array, inputs: int) -> None:
        """`scale`: f32 [out]."""
        self.length = group_length(format, inputs)
        self.stored = np.empty((inputs, len(scale)), np.uint8)
        self.scales = scale[None]
        self._inverse, self._scale = quant.inverse_of(scale)

    def begin(self, number: int, w: Array, weights: Array) -> None:
        step, point, *_ = quant.steps_of_runs(w * self._inverse, weights)
        self._low, self._high = -point * step, (np.float32(GridFormat.most) - point) * step
        self._step, self._units = step, self._inverse / step

    def round(self, i: int, w: Array, out: Array) -> None:
        np.multiply(w, self._units, out=out)
        np.rint(out, out=out)
        out *= self._step
        np.clip(out, self._low, self._high, out=out)
        self.stored[i] = out + np.float32(GridFormat.as_bytes.zero)
        out *= self._scale


def group_length(format: WeightFormat, in_: int) -> int:
    """Inputs of `in_` that are rounded one after the other because they share a grid."""
    return format.grid if isinstance(format, GridFormat) else format.group or in_


def grid_of(format: WeightFormat, w: Array, scales: Array) -> Grid:
    """The grid of a weight `w` f32 [in, out]. `scales` [out, groups]: of the same weight after plain rounding."""
    match format:
        case IntegerFormat():
            return _Integers(format, w)
        case GridFormat():
            return _Runs(format, np.ascontiguousarray(scales[:, 0]), len(w))
    raise AssertionError(format)
