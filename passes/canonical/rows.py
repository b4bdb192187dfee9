"""Rules about rows: matrix products with weights are linears, and the sampled rows are taken as early as possible."""

from __future__ import annotations

from typing import Any, Final

from xllm_compiler.analysis.weights import is_weight_expr
from xllm_compiler.dims import Dim
from xllm_compiler.ir.core import Op, Value
from xllm_compiler.ir.ops import Linear, MatMul, Take, Transpose
from xllm_compiler.ir.rewrite import Rewriter, Rule, rule
from xllm_compiler.ir.types import Tensor


@rule(MatMul)
def matmul_weight(op: MatMul, rw: Rewriter) -> bool:
    """x @ w with a fixed matrix."""
    if op.b.tensor.rank != 2 or not is_weight_expr(op.b) or is_weight_expr(op.a):
        return False
    w = rw.create(Transpose, op.b, perm=(1, 0))
    rw.replace(op, rw.create(Linear, op.a, w.result))
    return True


@rule(Take)
def take_early(op: Take, rw: Rewriter) -> bool:
    """take(f(x), rows) is f(take(x, rows)) when f treats rows one by one and nobody else reads f(x).

    So the vocabulary is computed for sampled rows only, however the model was traced, and the last MLP too.
    """
    made = op.x.op
    if made is None or op.axis != 0 or op.idx.op is not None or op.idx.tensor.rank != 1 or not op.x.has_one_use:
        return False
    rows = _row_axes(made, op.x.shape[0])
    if rows is None:
        return False
    operands = list(made.operands)
    for i, axis in rows.items():
        operands[i] = rw.create(Take, operands[i], op.idx, axis=axis).result
    rw.replace(op, rebuilt(made, operands, rw))
    return True


def _row_axes(op: Op, n: Dim) -> dict[int, int] | None:
    """Where `op` treats the `n` rows of its result one by one: by operand, the axis along which those rows lie in it.

    None where it does not, or where its attributes depend on how many rows there are.
    """
    if n.is_const or not op.SPEC.pure or len(op.results) != 1:
        return None
    fixed = [d for value in op.attrs.values() for d in (value if isinstance(value, tuple) else (value,))]
    if any(isinstance(d, Dim) and set(d.symbols) & set(n.symbols) for d in fixed):
        return None
    found: dict[int, int] = {}
    for i, v in enumerate(op.operands):
        for axis, size in enumerate(v.shape if isinstance(v.type, Tensor) else ()):
            if size is n:
                place = op.rows.follow(op, i, axis)
                if isinstance(place, str):
                    return None
                if place == 0:
                    found[i] = axis
    return found or None


def rebuilt(op: Op, operands: list[Value], rw: Rewriter) -> Op:
    """The same op over other operands."""
    fields: dict[str, Any] = dict(op.attrs)
    at = 0
    for field, count in zip(op.SPEC.operands, op.segments, strict=True):
        values = operands[at : at + count]
        at += count
        fields[field.name] = values if field.arity == "many" else values[0] if values else None
    return rw.create(type(op), loc=op.loc, **fields)


RULES: Final[tuple[Rule, ...]] = (matmul_weight,)
LATE_RULES: Final[tuple[Rule, ...]] = (take_early,)
