"""Intel AMX in TensorIR: tile registers, their shapes and dot products.

A tile register holds up to 16 rows of 64 bytes. One dot product multiplies 16 rows of `a` by 16 columns of `b`, and
adds to 16 by 16 sums. A row of `b` holds, for each column, 4 bytes along k: 2 bf16 or 4 8-bit integers.

In bf16 it sums the even and the odd k of a register apart, by fma in order, and then adds both to the sum. It takes
denormals as zero. Sums of integers are exact.

Register numbers are part of an instruction, so there is one intrinsic for each. Setting shapes zeroes all registers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm.tirx.script.builder import ir as T

from xllm_compiler.kernels.tir.codegen.builder import Scalars, address

Expr = Any
TILE_ROWS = 16
TILE_BYTES = 64  # of a row


class TileShapes:
    """The shapes of the tile registers. They are set at run time only where they change, since that takes long."""

    def __init__(self) -> None:
        self._words = T.alloc_buffer((8,), "int64", scope="local")
        self._now = Scalars(1, "int64")
        self._now[0] = T.int64(-1)

    def set(self, key: Expr, tiles: Sequence[tuple[Expr, int]]) -> None:
        """Emits: gives tile i the shape `tiles[i]` = (rows, bytes of a row), unless the last call had the same `key`,
        which is >= 0."""
        key = T.bind(T.Cast("int64", key))
        with T.If(self._now[0] != key), T.Then():
            self._now[0] = key
            words: list[Expr] = [T.int64(1), T.int64(0)]  # palette 1, the only one there is
            for half in (tiles[:4], tiles[4:]):
                words.append(T.int64(sum(width << (16 * i) for i, (_, width) in enumerate(half))))
            words += [T.int64(0), T.int64(0)]
            rows: Expr = T.int64(0)
            for i, (count, _) in enumerate(tiles):
                rows = rows + T.Cast("int64", count) * T.int64(1 << (8 * i))
            words += [rows, T.int64(0)]
            for i, word in enumerate(words):
                T.buffer_store(self._words, word, [i])
            _call("xllm_tile_shapes", address(self._words, 0))

    def release(self) -> None:
        """Emits the release of the registers, so that a context switch need not save them."""
        with T.If(self._now[0] >= T.int64(0)), T.Then():
            _call("xllm_tile_release")


def zero(tile: int) -> None:
    """Emits tile = 0."""
    _call(f"xllm_tile_zero_{tile}")


def load_tile(tile: int, pointer: Expr, stride: int) -> None:
    """Emits the load of a tile, whose rows begin `stride` bytes apart."""
    _call(f"xllm_tile_load_{tile}", pointer, T.int64(stride))


def store_tile(tile: int, pointer: Expr, stride: int) -> None:
    """Emits the store of a tile, whose rows begin `stride` bytes apart."""
    _call(f"xllm_tile_store_{tile}", pointer, T.int64(stride))


def dot(kind: str, sums: int, a: int, b: int) -> None:
    """Emits sums += a @ b. `kind`: "bf16", "i8u8" (signed by unsigned) or "i8i8". `sums` is in 0..3, `a` in 4..5, `b`
    in 5..7."""
    _call(f"xllm_tile_dot_{kind}_{sums}_{a}_{b}")


def _call(name: str, *args: Expr) -> None:
    T.evaluate(T.call_extern("int32", name, *args))
