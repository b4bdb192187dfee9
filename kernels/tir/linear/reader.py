"""How a linear kernel reads its weight: `WeightReader`, one class for each way. Owns what the walk over tiles asks for.

A reader says which arguments hold activations and weight, how large a tile its registers allow, and emits the sums
x[row + i] @ w.T of one tile as f32. What is done with the sums, and the walk over tiles, is linear.py's. Whatever the
tile, one output element is computed by the same operations in the same order.

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
_BLOCK = 8  # steps between two requests for weights that will be needed later

Ahead = Callable[[Expr, Expr | int], None]
"""`ahead(block, of)`: block number `block` of the `of` that a register tile's walk over k has begins."""
AheadOf = Callable[[Expr, tuple[Expr, Expr], Expr], Ahead]
"""`ahead(panel, walk, along)`: what a walk over k prefetches meanwhile; see linear.py."""


@dataclass(frozen=True)
class Site:
    """Where a kernel is built: its level and k, the rows of its register tiles at most, its arguments by name, and what
    it prefetches."""

    isa: Isa
    k: int
    most_rows: int
    env: dict[str, Expr]
    ahead: AheadOf


class WeightReader(ABC):
    """What a linear kernel asks of its weight."""

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
        """Vectors, 4, 2, 1 or none, of a register tile of `rows` rows."""

    def height(self, isa: Isa, most: int) -> int:
        """Rows, at most `most`, of the register tile that is used where there are rows enough."""
        return tile_rows(partial(self.width, isa), most)

    def widens(self, isa: Isa, k: int) -> bool:
        """Whether tiles want the rows of x in env["wide"]."""
        return False

    @abstractmethod
    def panel_bytes(self, k: int) -> int:
        """Bytes of one panel of the weight."""

    @abstractmethod
    def tile(
        self, env: dict[str, Expr], k: int, row: Expr, count: int, panel: Expr, at: range, ahead: Ahead
    ) -> list[Expr]:
        """Sums of `count` rows by the vectors `at` of a panel, row by row, as f32. Where `env` has "opened", that is
        the panel as `open` left it; it has what `scratch` made, too."""

    def scratch(self, isa: Isa, k: int, height: int) -> dict[str, Expr]:
        """Emits: memory that tiles of up to `height` rows work in, by name."""
        return {}

    def streams(self, isa: Isa) -> bool:
        """Whether a row is an instruction or two for each vector of weights."""
        return False

    def blocks(self, site: Site) -> BlockSums | None:
        """What makes the sums of blocks of rows instead of tiles; None where tiles are for all rows."""
        return None

    def opened_bytes(self, k: int) -> int:
        """Bytes of a panel that is taken apart once, where it meets many rows; 0: it is always met as it is stored."""
        return 0

    def open(self, env: dict[str, Expr], k: int, panel: Expr) -> None:
        """Emits: takes a panel apart, into env["opened"]: the same values in the form in which they are multiplied."""
        raise AssertionError("opened_bytes says 0")


_WEIGHT_ONLY = "w"


def weight_only(format: str) -> str:
    """How a kernel's `weights` says that x is not quantized: "wq8" for the format "q8"."""
    return _WEIGHT_ONLY + format


def parse_weights(weights: str) -> tuple[str, bool]:
    """The name of the weight format that a kernel's `weights` says, and whether x is quantized."""
    return weights.removeprefix(_WEIGHT_ONLY), not weights.startswith(_WEIGHT_ONLY)


def in_blocks(steps: Expr | int, ahead: Ahead, body: Callable[[Expr], None]) -> None:
    """`body(step)` for all steps in order, telling `ahead` about every block of them. Where their number is known at
    run time only, it is one of whole blocks."""
    whole, rest = divmod(steps, _BLOCK) if isinstance(steps, int) else (T.truncdiv(steps, T.int32(_BLOCK)), 0)
    blocks = whole + (rest > 0)
    if not isinstance(whole, int) or whole:
        with T.serial(0, whole) as block:
            ahead(block, blocks)
            with T.serial(0, _BLOCK) as step:
                body(T.bind(block * _BLOCK + step))
    if rest:
        ahead(T.int32(whole), blocks)
        with T.serial(whole * _BLOCK, steps) as step:
            body(step)
