"""Proves that a traced step treats every token on its own, except inside attention.

The model was traced over one sequence; the step function runs it over tokens of many requests side by side. That is
the same only if no operation but attention lets one token see another, or its place in the step. A model that, say,
numbers its tokens by their index, sums over them or slides a convolution along them, would compile and be wrong; here
it is refused, with the operation's source line.

The analysis follows the axis on which the tokens lie (its size mentions N, or S after the sampled rows were taken).
What an op does to it is said by the op's class (`rows`).
"""

from __future__ import annotations

from xllm_compiler.errors import XllmError
from xllm_compiler.ir import ops
from xllm_compiler.ir.core import Func, Op, Value
from xllm_compiler.ir.rows import ThroughState
from xllm_compiler.ir.types import Future, Tensor

ROW_SYMBOLS = ("N", "S")


def row_axes(v: Value) -> list[int]:
    """The axes of a tensor, or of a promised one, along which tokens (or sampled rows) lie."""
    ty = v.type.of if isinstance(v.type, Future) else v.type
    if not isinstance(ty, Tensor):
        return []
    return [i for i, d in enumerate(ty.shape) if any(s in ROW_SYMBOLS for s in d.symbols)]


def check_rows(func: Func) -> None:
    """XllmError("unsupported") at the first operation that may mix tokens of the step."""
    for op in func.ops:
        reason = _mixes(op)
        if reason:
            raise XllmError(
                "unsupported",
                f"{op.name} {reason}; outside of attention every token has to be computed on its own",
                where=op.loc.describe(),
            )


def _mixes(op: Op) -> str | None:
    """Why `op` may let tokens see each other or their index in the step; None when it does not."""
    if any(len(row_axes(r)) > 1 for r in op.results):
        return "makes a tensor with two token axes"
    if isinstance(op.rows, ThroughState) or _takes_sampled(op):
        return None
    places: set[int] = set()
    for i, v in enumerate(op.operands):
        axes = row_axes(v)
        if len(axes) > 1:
            return "reads a tensor with two token axes"
        for axis in axes:
            place = op.rows.follow(op, i, axis)
            if isinstance(place, str):
                return place
            places.add(place)
    if len(places) > 1:
        return "pairs different tokens"
    begun = [axis for r in op.results for axis in row_axes(r) if axis not in places]
    return next((why for axis in begun if (why := op.rows.begin(op, axis))), None)


def _takes_sampled(op: Op) -> bool:
    """Whether `op` takes the rows of which logits are wanted: the one choice of tokens by their index in the step."""
    return isinstance(op, ops.Take) and op.idx.op is None and op.idx.name == "sel" and row_axes(op.x) == [op.axis]
