"""How a linear kernel reads its weight: `WeightReader`, with one class for each way.

A reader says which arguments hold activations and weight, and how large a register tile may be. It emits the sums
x[row + i] @ w.T of one tile, as f32. linear.py loops over the tiles and uses the sums. One output element is computed
by the same operations in the same order, whatever the tile.

    dense.py        weights in the type of the activations
    integer.py      `IntegerFormat` by 8-bit activations
    grid.py         `GridFormat` by 8-bit activations
    weight_only.py  any format by activations of the model's own type

Which one a kernel uses is readers.py's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from tvm.tirx.script.builder import ir as T

from xllm_compiler.kernels.tir.codegen.builder import tile_rows
from xllm_compiler.kernels.tir.codegen.kernel import Arg
from xllm_compiler.kernels.tir.isa.levels import Isa
from xllm_compiler.kernels.tir.linear.blocks import BlockSums

Expr = Any
_BLOCK = 8  # steps between two prefetches

Prefetch = Callable[[Expr, Expr | int], None]
"""`prefetch(block, of)` emits the prefetches for block `block` of the `of` blocks of a register tile's loop over k."""
PrefetchOf = Callable[[Expr, tuple[Expr, Expr], Expr], Prefetch]
"""`prefetch(panel, loop, along)` says what a loop over k prefetches meanwhile; see `_Loop._prefetch` in linear.py."""


@dataclass(frozen=True)
class Site:
    """What a kernel is built for: its level, k, the most rows of a register tile, its arguments by name, and what it
    prefetches."""

    isa: Isa
    k: int
    most_rows: int
    env: dict[str, Expr]
    prefetch: PrefetchOf


class WeightReader(ABC):
    """What a linear kernel must know of its weight."""

    int8_dots: bool = False
    """Whether it multiplies bytes."""

    @abstractmethod
    def args(self, k: int, rows_of: str) -> tuple[Arg, ...]:
        """Activations, then the weight; `rows_of` describes its packed rows."""

    def at(self, isa: Isa, k: int) -> WeightReader:
        """The reader to use at a level."""
        return self

    @abstractmethod
    def width(self, isa: Isa, rows: int) -> int:
        """How many vectors wide a register tile of `rows` rows is: 4, 2 or 1; 0 where none fits."""

    def height(self, isa: Isa, most: int) -> int:
        """Rows, at most `most`, of the register tile that is used where there are enough rows."""
        return tile_rows(partial(self.width, isa), most)

    def widens(self, isa: Isa, k: int) -> bool:
        """Whether tiles read the rows of x from env["wide"], widened to f32."""
        return False

    @abstractmethod
    def panel_bytes(self, k: int) -> int:
        """Bytes of one panel of the weight."""

    @abstractmethod
    def tile(
        self, env: dict[str, Expr], k: int, row: Expr, count: int, panel: Expr, at: range, prefetch: Prefetch
    ) -> list[Expr]:
        """Emits the sums of `count` rows by the vectors `at` of a panel; returns them row by row, as f32.

        `env` has what `scratch` made. Where it has "unpacked", that is the panel as `unpack` left it."""

    def scratch(self, isa: Isa, k: int, height: int) -> dict[str, Expr]:
        """Emits the memory that tiles of up to `height` rows work in; returns it by name."""
        return {}

    def streams(self, isa: Isa) -> bool:
        """Whether each row takes only one or two instructions for a vector of weights."""
        return False

    def blocks(self, site: Site) -> BlockSums | None:
        """What computes blocks of rows instead of register tiles; None where register tiles compute all rows."""
        return None

    def unpacked_bytes(self, k: int) -> int:
        """Bytes of an unpacked panel, which is unpacked once where many rows are multiplied by it. 0: panels are always
        multiplied as they are stored."""
        return 0

    def unpack(self, env: dict[str, Expr], k: int, panel: Expr) -> None:
        """Emits: unpacks a panel to env["unpacked"], the same values in the form in which they are multiplied."""
        raise AssertionError("unpacked_bytes says 0")


_WEIGHT_ONLY = "w"


def weight_only(format: str) -> str:
    """How a kernel's `weights` says that x is not quantized: "wq8" for the format "q8"."""
    return _WEIGHT_ONLY + format


def parse_weights(weights: str) -> tuple[str, bool]:
    """The name of the weight format that a kernel's `weights` says, and whether x is quantized."""
    return weights.removeprefix(_WEIGHT_ONLY), not weights.startswith(_WEIGHT_ONLY)


def in_blocks(steps: Expr | int, prefetch: Prefetch, body: Callable[[Expr], None]) -> None:
    """Emits `body(step)` for all steps in order, with `prefetch` before each block of them. A number of steps that is
    known at run time only must be a multiple of the block."""
    whole, rest = divmod(steps, _BLOCK) if isinstance(steps, int) else (T.truncdiv(steps, T.int32(_BLOCK)), 0)
    blocks = whole + (rest > 0)
    if not isinstance(whole, int) or whole:
        with T.serial(0, whole) as block:
            prefetch(block, blocks)
            with T.serial(0, _BLOCK) as step:
                body(T.bind(block * _BLOCK + step))
    if rest:
        prefetch(T.int32(whole), blocks)
        with T.serial(whole * _BLOCK, steps) as step:
            body(step)
