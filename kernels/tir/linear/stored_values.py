"""`stored_values`: loads stored weights of each format and widens them to floats, in registers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Final

from tvm.tirx.script.builder import ir as T

from xllm_compiler.kernels.tir.codegen.builder import address, splat
from xllm_compiler.kernels.tir.isa.levels import LANES
from xllm_compiler.kernels.tir.linear.grid_bytes import Run
from xllm_compiler.weight_formats import PANEL, QUAD, GridFormat, IntegerFormat, WeightFormat

Expr = Any
Value = Callable[[int, int], Expr]
"""`value(j, element)`: one element of a step for the 16 columns of the j-th vector, less their zero points, as f32."""
_STEP_BYTES = PANEL * QUAD
_LARGE = 1 << 23  # f32 from here on are whole numbers: the bits of 2^23 + n are those of 2^23, plus n


class StoredValues(ABC):
    """The values of the group at byte `start` of `w`, for the columns of the vectors `at`."""

    elements: int
    """How many values along k a step has for each column."""

    @abstractmethod
    def step(self, number: Expr) -> Value:
        """Emits the loads of step `number`."""


class _Integers(StoredValues):
    def __init__(self, format: IntegerFormat, w: Expr, start: Expr, at: range) -> None:
        self._format, self._w, self._at = format, w, at
        self.elements = QUAD * 8 // format.bits
        self._values = T.bind(start + format.header_bytes)
        self._points = [_zero_point(format, w, start, vector) for vector in at]

    def step(self, number: Expr) -> Value:
        where = self._values + number * _STEP_BYTES
        loaded = [
            T.bind(T.call_extern("int32x16", "xllm_load_i32", address(self._w, where + vector * LANES * QUAD)))
            for vector in self._at
        ]
        return lambda j, element: _widened(self._format.bits, loaded[j], element, self._points[j])


class _Grids(StoredValues):
    def __init__(self, format: GridFormat, w: Expr, start: Expr, at: range) -> None:
        self._format, self._w, self._at = format, w, at
        self.elements = 2 * QUAD
        self._values = T.bind(start + format.header_bytes)
        self._points = [_zero_point(format, w, start, vector) for vector in at]

    def step(self, number: Expr) -> Value:
        steps = self._format.grid // (2 * QUAD)
        run = T.truncdiv(number, T.int32(steps))
        unpacked = Run(self._w, T.bind(self._values + T.Cast("int64", run) * self._format.run_bytes))
        quads = [unpacked.columns(vector)(number - run * steps) for vector in self._at]
        bits = self._format.as_bytes.bits
        return lambda j, element: _widened(bits, quads[j][element // QUAD], element % QUAD, self._points[j])


_OF: Final[dict[type[WeightFormat], Callable[[Any, Expr, Expr, range], StoredValues]]] = {
    IntegerFormat: _Integers,
    GridFormat: _Grids,
}


def stored_values(format: WeightFormat, w: Expr, start: Expr, at: range) -> StoredValues:
    """The values of the group of a panel that begins at byte `start` of `w`, for the columns of the vectors `at`."""
    return _OF[type(format)](format, w, start, at)


def unpack_group(format: WeightFormat, w: Expr, start: Expr, length: int, to: Expr, at: Expr) -> None:
    """Emits: unpacks one group of a panel to `to`, from byte `at` on, as pairs of bf16 along k for each of the 64
    columns. The group has `length` values and begins at byte `start` of `w`; its zero points are taken off."""
    vectors = range(PANEL // LANES)
    stored = stored_values(format, w, start, vectors)
    elements = stored.elements
    with T.serial(0, length // elements) as step:
        value = stored.step(step)
        for vector in vectors:
            for first in range(0, elements, 2):
                pair = as_pair([value(vector, first + i) for i in range(2)])
                place = at + step * (elements * 2 * PANEL) + (first // 2 * _STEP_BYTES + vector * LANES * QUAD)
                T.evaluate(T.call_extern("int32", "xllm_store_i32", address(to, place), pair))


def _zero_point(format: WeightFormat, w: Expr, start: Expr, vector: int) -> Expr:
    """2^23 plus the zero points of 16 columns of the group at byte `start`, as f32."""
    if not format.zeros:
        return T.bind(splat(float(_LARGE + format.zero)))
    where = start + PANEL * format.scale_bytes + vector * LANES
    zeros = T.call_extern("int32x16", "xllm_load_u8", address(w, where))
    return T.bind(T.Cast("float32x16", zeros) + splat(float(_LARGE)))


def _widened(bits: int, loaded: Expr, element: int, point: Expr) -> Expr:
    """Value `element` of each lane's quad, or pair of quads, less the zero point, as f32."""
    shift = 8 * (element % QUAD) + 4 * (element // QUAD)
    shifted = T.shift_right(loaded, T.broadcast(T.int32(shift), LANES)) if shift else loaded
    stored = T.bitwise_and(shifted, T.broadcast(T.int32((1 << bits) - 1), LANES))
    large = T.bitwise_or(stored, T.broadcast(T.int32(0x4B000000), LANES))
    return T.bind(T.reinterpret("float32x16", large) - point)


def as_pair(values: list[Expr]) -> Expr:
    """One or two f32 that bf16 can hold exactly, as a pair of bf16. The first is in the lower half."""
    bits = [T.reinterpret("int32x16", value) for value in values]
    low = T.bitwise_and(T.shift_right(bits[0], T.broadcast(T.int32(16), LANES)), T.broadcast(T.int32(0xFFFF), LANES))
    return T.bind(low if len(bits) == 1 else T.bitwise_or(low, bits[1]))
