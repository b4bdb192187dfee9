"""Which integers a function can bear: values that end as an index must lie in a range. Owns that backward walk only.

index_ranges(func, {"N": 7})[func.arg("ids")]     # Range(0, 31): rows of the embedding table
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from xllm_compiler.ir.core import Func, Op, Value
from xllm_compiler.ir.ops import Const, Embedding, StateRead, StateWrite, Take
from xllm_compiler.ir.types import INTS, State, Tensor

# Results that are values of their operands, every one of them or one after the other.
_PASSING = frozenset(
    {"t.reshape", "t.transpose", "t.expand", "t.slice", "t.concat", "t.pad", "t.cast", "t.max", "t.min", "t.clamp"}
)


@dataclass(frozen=True, slots=True)
class Range:
    """Integers lo..hi, both included; empty where hi < lo."""

    lo: int
    hi: int

    def meet(self, other: Range | None) -> Range:
        """What is in both."""
        return self if other is None else Range(max(self.lo, other.lo), min(self.hi, other.hi))


def index_ranges(func: Func, dims: Mapping[str, int]) -> dict[Value, Range]:
    """For every integer value with limits: the range in which it must lie so that no index leaves its table.

    Limits travel backward through moves, casts and arithmetic with constants; the walk is cautious (a limit may be
    tighter than needed) and gives up on arithmetic between two unknown values.
    """
    out: dict[Value, Range] = {}

    def demand(v: Value, r: Range | None) -> None:
        if r is not None and isinstance(v.type, (Tensor, State)) and v.type.dtype in INTS:
            out[v] = r.meet(out.get(v))

    for op in reversed(func.ops):
        if isinstance(op, Embedding):
            demand(op.ids, Range(0, op.w.shape[0].evaluate(dims) - 1))
        elif isinstance(op, Take):
            demand(op.idx, Range(0, op.x.shape[op.axis].evaluate(dims) - 1))
        elif isinstance(op, (StateRead, StateWrite)):
            demand(op.slot, Range(0, op.cell.cell.slots.evaluate(dims) - 1))
        elif op.name == "t.pow":
            demand(op.operands[1], Range(0, 4))  # numpy has no negative integer powers
        wanted = out.get(op.results[0]) if op.results else None
        for i, v in enumerate(op.operands):
            demand(v, None if wanted is None else _through(op, i, wanted))
    return out


def _through(op: Op, index: int, wanted: Range) -> Range | None:
    """What operand `index` must keep so that the result keeps `wanted`; None: nothing, or not known."""
    if op.name in _PASSING:
        return wanted
    if op.name in ("state.read", "state.write"):
        return None if index == op.field_index("slot") else wanted  # what was written is read by a later call
    if op.name in ("t.where", "t.take"):
        return wanted if (index == 0) == (op.name == "t.take") else None
    if len(op.operands) != 2:
        return Range(-wanted.hi, -wanted.lo) if op.name == "t.neg" else None
    other = op.operands[1 - index].op
    c = other.value if isinstance(other, Const) and isinstance(other.value, int) else None
    if c is None:
        return None
    match op.name:
        case "t.add":
            return Range(wanted.lo - c, wanted.hi - c)
        case "t.sub":
            return Range(wanted.lo + c, wanted.hi + c) if index == 0 else Range(c - wanted.hi, c - wanted.lo)
        case "t.mul" if c > 0:
            return Range(-(-wanted.lo // c), wanted.hi // c)
        case "t.floordiv" if c > 0 and index == 0:
            return Range(wanted.lo * c, wanted.hi * c + c - 1)
        case "t.mod" if c > 0 and index == 0:
            return None if wanted.lo <= 0 and wanted.hi >= c - 1 else wanted
    return None
