"""The kinds of `rows` that op classes name: which axis rows lie along afterwards, or why an op mixes them.

Owns these rules; each is for a family of ops and reads their fields. Who asks: the frontend, which proves that a step
may hold tokens of many requests, and passes that compute fewer rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from xllm_compiler.dims import Dim
from xllm_compiler.ir.core import Op
from xllm_compiler.ir.facts import Rows
from xllm_compiler.ir.shapes import product, same_dim


@dataclass(frozen=True)
class NoRows(Rows):
    """Ops without tensor operands."""

    def __str__(self) -> str:
        return "none"

    def follow(self, op: Any, operand: int, axis: int) -> int | str:
        return "has no rows"


@dataclass(frozen=True)
class Broadcast(Rows):
    """Operands meet element by element, last axes together, as in numpy."""

    def __str__(self) -> str:
        return "row by row"

    def follow(self, op: Any, operand: int, axis: int) -> int | str:
        x, y = op.operands[operand].tensor, op.results[0].tensor
        place: int = axis + y.rank - x.rank
        if not same_dim(op.scope, x.shape[axis], y.shape[place]):
            return "spreads one row over many"
        return place

    def begin(self, op: Op, axis: int) -> str | None:
        return None


@dataclass(frozen=True)
class SameAxes(Rows):
    """Axis i of the operand is axis i of the result, element by element."""

    def __str__(self) -> str:
        return "row by row"

    def follow(self, op: Any, operand: int, axis: int) -> int | str:
        return axis


@dataclass(frozen=True)
class Along(Rows):
    """Values meet along the axes in `attributes` only; all others stay where they are."""

    attributes: tuple[str, ...] = ("axis",)
    why: str = "works along the token axis"

    def __str__(self) -> str:
        return "mixed along " + ", ".join(f"`{name}`" for name in self.attributes)

    def follow(self, op: Any, operand: int, axis: int) -> int | str:
        return self.why if axis in (getattr(op, name) for name in self.attributes) else axis


@dataclass(frozen=True, init=False)
class LastAxis(Rows):
    """Values meet along the last axis of operand 0 only. The operands called `beside` have its other axes too; the rest
    are weights, the same for every row."""

    beside: tuple[str, ...]

    def __init__(self, *beside: str) -> None:
        object.__setattr__(self, "beside", beside)

    def __str__(self) -> str:
        return "mixed along the last axis"

    def follow(self, op: Any, operand: int, axis: int) -> int | str:
        if operand != 0 and not _is_one_of(op, operand, self.beside):
            return "uses values of tokens as weights"
        return "contracts the token axis" if axis == op.operands[0].tensor.rank - 1 else axis


@dataclass(frozen=True, init=False)
class FirstAxis(Rows):
    """Rows lie along axis 0 of the operands called `fields` and of the results; each is treated as a whole."""

    fields: tuple[str, ...]

    def __init__(self, *fields: str) -> None:
        object.__setattr__(self, "fields", fields)

    def __str__(self) -> str:
        return "row by row along the first axis"

    def follow(self, op: Any, operand: int, axis: int) -> int | str:
        if not _is_one_of(op, operand, self.fields):
            return "uses values of tokens as weights"
        return "works along the token axis" if axis else 0


@dataclass(frozen=True)
class ThroughState(Rows):
    """Rows meet those of the same request through a state, such as a KV cache, and no others."""

    def __str__(self) -> str:
        return "within a request, through a state"

    def follow(self, op: Any, operand: int, axis: int) -> int | str:
        return "lets tokens of a request see each other"


@dataclass(frozen=True)
class Gathered(Rows):
    """Operand 0 picks rows of operand 1, which is a table of weights."""

    def __str__(self) -> str:
        return "picked, one by one"

    def follow(self, op: Any, operand: int, axis: int) -> int | str:
        return "uses values of tokens as weights" if operand else axis


@dataclass(frozen=True)
class Taken(Rows):
    """Along `axis` of x rows are picked by idx, whose axes stand there in the result."""

    def __str__(self) -> str:
        return "picked along `axis`"

    def follow(self, op: Any, operand: int, axis: int) -> int | str:
        if operand == 1:
            return int(op.axis) + axis
        if axis == op.axis:
            return "picks tokens by index"
        return axis if axis < op.axis else axis - 1 + int(op.idx.tensor.rank)


@dataclass(frozen=True)
class AlongAxis(Rows):
    """Values of operand 0 meet along `axis` only. The other operands are weights, the same for every row."""

    def __str__(self) -> str:
        return "mixed along `axis`"

    def follow(self, op: Any, operand: int, axis: int) -> int | str:
        if operand:
            return "uses values of tokens as weights"
        return "contracts the token axis" if axis == op.axis else axis


@dataclass(frozen=True)
class Reduced(Rows):
    """Values meet along the axes in attribute `axes`, which stay as 1 with `keep`."""

    def __str__(self) -> str:
        return "mixed along `axes`"

    def follow(self, op: Any, operand: int, axis: int) -> int | str:
        if axis in op.axes:
            return "combines values of different tokens"
        return axis if op.keep else axis - sum(a < axis for a in op.axes)


@dataclass(frozen=True)
class Reshaped(Rows):
    """An axis stays one where it keeps its size and as many elements stand before it."""

    def __str__(self) -> str:
        return "row by row where the axis stays whole"

    def follow(self, op: Any, operand: int, axis: int) -> int | str:
        old: Sequence[Dim] = op.x.shape
        new: Sequence[Dim] = op.results[0].shape
        for place, size in enumerate(new):
            if size is old[axis] and product(old[:axis]) is product(new[:place]):
                return place
        return "folds the token axis into another"


@dataclass(frozen=True)
class Transposed(Rows):
    """Axes change places."""

    def __str__(self) -> str:
        return "row by row"

    def follow(self, op: Any, operand: int, axis: int) -> int | str:
        return int(op.perm.index(axis))


@dataclass(frozen=True)
class Multiplied(Rows):
    """The last axis of operand 0 meets the last but one of operand 1; leading axes broadcast."""

    def __str__(self) -> str:
        return "mixed along the contracted axis"

    def follow(self, op: Any, operand: int, axis: int) -> int | str:
        rank = op.operands[operand].tensor.rank
        if axis == rank - 1 - operand:
            return "contracts the token axis"
        return axis + int(op.results[0].tensor.rank) - int(rank)


def _is_one_of(op: Op, operand: int, fields: Sequence[str]) -> bool:
    """Whether operand number `operand` belongs to one of these operand fields."""
    at = 0
    for field, count in zip(op.SPEC.operands, op.segments, strict=True):
        if at <= operand < at + count:
            return field.name in fields
        at += count
    return False
