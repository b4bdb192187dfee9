"""Proves that a traced step treats every token on its own, except inside attention.

The model was traced over one sequence; the step function runs it over tokens of many requests side by side. That is
the same only if no operation but attention lets one token see another, or its place in the step. A model that, say,
numbers its tokens by their index, sums over them or slides a convolution along them, would compile and be wrong; here
it is refused, with the operation's source line.

The analysis follows the axis on which the tokens lie (its size mentions N, or S after the sampled rows were taken).
"""

from __future__ import annotations

from collections.abc import Sequence

from xllm_compiler.dims import Dim, as_dim
from xllm_compiler.errors import XllmError
from xllm_compiler.ir import ops
from xllm_compiler.ir.core import Func, Op, Value
from xllm_compiler.ir.types import Tensor

ROW_SYMBOLS = ("N", "S")

_ALONG_LAST = (ops.Linear, ops.RmsNorm, ops.LayerNorm)
_ANY_AXIS = (ops.Transpose, ops.Expand)


def row_axes(v: Value) -> list[int]:
    """The axes of a tensor along which tokens (or sampled rows) lie."""
    if not isinstance(v.type, Tensor):
        return []
    return [i for i, d in enumerate(v.shape) if any(s in ROW_SYMBOLS for s in d.symbols)]


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
    result = op.results[0]
    axes = row_axes(result)
    if len(axes) > 1:
        return "makes a tensor with two token axes"
    if isinstance(op, ops.Iota):
        return "numbers the tokens by their index in the step, not by their position" if axes else None
    if isinstance(op, (ops.KvWrite, ops.KvAttend)):
        return None
    touched = [v for v in op.operands if row_axes(v)]
    if not touched:
        return None
    for v in touched:
        if len(row_axes(v)) > 1:
            return "reads a tensor with two token axes"
    axis = row_axes(touched[0])[0]
    if isinstance(op, (ops.Reduce,)):
        return "combines values of different tokens" if axis in op.axes else None
    if isinstance(op, (ops.Softmax, ops.CumSum, ops.Slice, ops.Pad)):
        return "works along the token axis" if op.axis == axis else None
    if isinstance(op, ops.Concat):
        return "joins along the token axis" if op.axis in (axis, *axes) else None
    if isinstance(op, ops.Reshape):
        return None if _keeps_rows(op) else "folds the token axis into another"
    if isinstance(op, _ANY_AXIS):
        return None
    if isinstance(op, _ALONG_LAST):
        return "contracts the token axis" if axis == touched[0].tensor.rank - 1 else _only_first(op, touched)
    if isinstance(op, ops.Embedding):
        return _only_first(op, touched)
    if isinstance(op, ops.Take):
        return _take(op, touched)
    if isinstance(op, ops.MatMul):
        contracted = {id(op.a): op.a.tensor.rank - 1, id(op.b): op.b.tensor.rank - 2}
        return "contracts the token axis" if any(row_axes(v)[0] == contracted[id(v)] for v in touched) else None
    if _elementwise(op):
        rank = result.tensor.rank
        places = {row_axes(v)[0] + rank - v.tensor.rank for v in touched}
        return None if len(places) == 1 else "pairs different tokens"
    return "is not known to treat tokens one by one"


def _only_first(op: Op, touched: Sequence[Value]) -> str | None:
    return None if all(v is op.operands[0] for v in touched) else "uses values of tokens as weights"


def _elementwise(op: Op) -> bool:
    return type(op).__module__ == ops.Add.__module__


def _take(op: ops.Take, touched: Sequence[Value]) -> str | None:
    if not row_axes(op.x):
        return None
    if row_axes(op.x)[0] != op.axis:
        return None if not row_axes(op.idx) else "looks up by token in values of tokens"
    return None if op.idx.name == "sel" and op.idx.op is None else "picks tokens by index"


def _keeps_rows(op: ops.Reshape) -> bool:
    """The token axis stays an axis of the same size with as many elements before it."""
    before, after = row_axes(op.x), row_axes(op.result)
    if len(before) != 1 or len(after) != 1:
        return False
    old, new = op.x.shape, op.result.shape
    return old[before[0]] is new[after[0]] and _product(old[: before[0]]) is _product(new[: after[0]])


def _product(shape: Sequence[Dim]) -> Dim:
    n = as_dim(1)
    for d in shape:
        n = n * d
    return n
