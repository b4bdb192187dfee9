"""Rules about rows: matrix products with weights are linears, and the sampled rows are taken as early as possible."""

from __future__ import annotations

from typing import Any, Final

from xllm_compiler.analysis.weights import is_weight_expr
from xllm_compiler.ir.core import Op, Value
from xllm_compiler.ir.ops import (
    Add,
    Cast,
    Clamp,
    Div,
    Gelu,
    LayerNorm,
    Linear,
    LinearGlu,
    MatMul,
    Mul,
    Neg,
    Relu,
    RmsNorm,
    Sigmoid,
    Silu,
    Slice,
    Sub,
    Take,
    Tanh,
    Transpose,
)
from xllm_compiler.ir.rewrite import Rewriter, Rule, rule

_UNARY: Final[tuple[type[Op], ...]] = (Cast, Clamp, Gelu, Neg, Relu, Sigmoid, Silu, Tanh)
_BINARY: Final[tuple[type[Op], ...]] = (Add, Div, Mul, Sub)
_LAST_AXIS: Final[tuple[type[Op], ...]] = (LayerNorm, Linear, LinearGlu, RmsNorm)


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
    made, n = op.x.op, op.x.shape[0]
    if made is None or op.axis != 0 or op.idx.op is not None or not op.x.has_one_use:
        return False
    if n.is_const or op.x.tensor.rank < 2 or not _row_by_row(made):
        return False
    rank = op.x.tensor.rank
    rows = [v.tensor.rank == rank and v.shape[0] is n for v in made.operands]
    operands = [rw.create(Take, v, op.idx, axis=0).result if r else v for v, r in zip(made.operands, rows, strict=True)]
    rw.replace(op, rebuilt(made, operands, rw))
    return True


def _row_by_row(op: Op) -> bool:
    if isinstance(op, Slice):
        return op.axis > 0
    return isinstance(op, (*_UNARY, *_BINARY, *_LAST_AXIS))


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
