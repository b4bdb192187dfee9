"""What fusion passes ask of the graph, and how they move weights about."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from xllm_compiler.analysis.weights import is_weight_expr
from xllm_compiler.ir.core import Op, Value
from xllm_compiler.ir.ops import (
    Concat,
    Const,
    Dequantize,
    Gelu,
    Linear,
    Mul,
    Pow,
    Relu,
    Reshape,
    Sigmoid,
    Silu,
    Slice,
    Tanh,
    Transpose,
)
from xllm_compiler.ir.rewrite import Rewriter

_FORM = ("format", "rotate", "dtype")  # attributes of quant.dequantize


def hoist(values: Iterable[Value | None], anchor: Op) -> None:
    """Moves weight expressions, with all they are made of, before `anchor`, where they do not stand there already."""
    for v in values:
        if v is not None and v.op is not None and not v.op.is_before(anchor):
            hoist(v.op.operands, anchor)
            v.op.move_before(anchor)


def all_or_none(values: Sequence[Value | None]) -> bool:
    """Whether every value is there, or none."""
    return all(v is None for v in values) or all(v is not None for v in values)


def bare_linear(v: Value) -> Linear | None:
    """The nn.linear that defines `v`, if nothing but an optional bias is fused into it and its weight is fixed."""
    op = v.op
    if not isinstance(op, Linear) or op.residual is not None or op.act != "none" or op.partial:
        return None
    if not is_weight_expr(op.w) or (op.bias is not None and not is_weight_expr(op.bias)):
        return None
    return op


def activation_of(v: Value) -> tuple[str, Value] | None:
    """(name, argument) where `v` is one of nn.linear's activations of something."""
    match v.op:
        case Silu(x=x):
            return "silu", x
        case Relu(x=x):
            return "relu", x
        case Sigmoid(x=x):
            return "sigmoid", x
        case Tanh(x=x):
            return "tanh", x
        case Gelu() as op:
            return ("gelu_tanh" if op.tanh else "gelu"), op.x
        case Mul() as op if op.a is op.b and isinstance(op.a.op, Relu):
            return "relu2", op.a.op.x
        case Pow() as op if isinstance(op.a.op, Relu) and isinstance(op.b.op, Const) and op.b.op.value == 2:
            return "relu2", op.a.op.x
    return None


@dataclass(frozen=True, slots=True)
class Columns:
    """Some output columns of a linear, in some order: `steps` (t.reshape, t.slice, t.transpose that leave the token
    axis alone) lead from its result to `value` [tokens, ...]."""

    linear: Linear
    steps: tuple[Op, ...]
    value: Value

    def weight(self, rw: Rewriter) -> Value:
        """The rows of the linear's weight that yield these columns, [columns, in]."""
        return by_part(rw, [self.linear.w], lambda parts: self._rows(rw, parts[0]))

    def bias(self, rw: Rewriter) -> Value | None:
        """The matching entries of its bias, [columns]."""
        return None if self.linear.bias is None else self._rows(rw, self.linear.bias)

    def _rows(self, rw: Rewriter, w: Value) -> Value:
        """The same steps on axis 0 of `w` [out, ...]: the token axis in front of them is gone, w's others follow."""
        place = self.contiguous
        if place is not None:
            whole = place == (0, w.shape[0].value)
            return w if whole else rw.create(Slice, w, axis=0, start=place[0], stop=place[1]).result
        rest = w.shape[1:]
        at = w
        for step in self.steps:
            match step:
                case Reshape():
                    at = rw.create(Reshape, at, shape=(*step.result.shape[1:], *rest)).result
                case Slice():
                    rows = rw.create(Slice, at, axis=step.axis - 1, start=step.start, stop=step.stop, step=step.step)
                    at = rows.result
                case Transpose():
                    perm = [p - 1 for p in step.perm[1:]]
                    at = rw.create(Transpose, at, perm=(*perm, *range(len(perm), len(perm) + len(rest)))).result
        if at.tensor.rank > w.tensor.rank:
            columns = at.tensor.elements if not rest else at.tensor.elements // w.shape[1]
            at = rw.create(Reshape, at, shape=(columns, *rest)).result
        return at

    @property
    def contiguous(self) -> tuple[int, int] | None:
        """(start, stop) where the columns are an ordinary range of the linear's output."""
        start, stop = 0, self.linear.w.shape[0]
        if not stop.is_const:
            return None
        end = stop.value
        for step in self.steps:
            if isinstance(step, Reshape):
                continue
            if not isinstance(step, Slice) or step.step != 1 or step.axis != 1 or step.x.tensor.rank < 2:
                return None
            inner = step.x.tensor.with_(shape=step.x.shape[2:]).elements
            if not (step.start.is_const and step.stop.is_const and inner.is_const):
                return None
            start, end = start + step.start.value * inner.value, start + step.stop.value * inner.value
        return start, end


def columns_of(v: Value) -> Columns | None:
    """`v` as columns of a bare linear over [tokens, in], or None."""
    value, steps = v, []
    while isinstance(v.op, (Reshape, Slice, Transpose)):
        op = v.op
        steps.append(op)
        v = op.x
    linear = bare_linear(v)
    if linear is None or linear.x.tensor.rank != 2:
        return None
    n = v.shape[0]
    for op in steps:
        if op.x.shape[0] is not n or op.result.shape[:1] != (n,):
            return None
        if (isinstance(op, Slice) and op.axis == 0) or (isinstance(op, Transpose) and op.perm[0] != 0):
            return None
        if not all(d.is_const for d in op.result.shape[1:]):
            return None
    return Columns(linear, tuple(reversed(steps)), value)


def only_lead_to(parts: Sequence[Columns]) -> bool:
    """Whether nothing else reads the linears or the steps between them and the parts' values."""
    inside: dict[Op, None] = {}
    for p in parts:
        inside.update(dict.fromkeys(p.steps))
    ends = {p.value for p in parts}
    for op in (*inside, *(p.linear for p in parts)):
        if op.result not in ends and any(u not in inside for u in op.result.users):
            return False
    return True


def same_form(weights: Sequence[Value]) -> bool:
    """Whether the weights are all quantized, in one form, or none of them is."""
    forms: list[object] = []
    for w in weights:
        op = w.op
        forms.append([op.attrs[name] for name in _FORM] if isinstance(op, Dequantize) else [])
    return all(form == forms[0] for form in forms)


def by_part(rw: Rewriter, weights: Sequence[Value], rows: Callable[[Sequence[Value]], Value]) -> Value:
    """`rows` of the weights, where it puts whole rows [out, ..] in some order: of quantized weights, which have one
    form, it does so with their integers, scales and zero points, and the result is quantized in that form."""
    quantized = [w.op for w in weights if isinstance(w.op, Dequantize)]
    if not quantized:
        return rows(weights)
    first = quantized[0]
    values, scales = rows([q.values for q in quantized]), rows([q.scales for q in quantized])
    points = [q.zeros for q in quantized if q.zeros is not None]
    if values is first.values:
        return first.result
    zeros = rows(points) if points else None
    form: dict[str, Any] = {name: first.attrs[name] for name in _FORM}
    return rw.create(Dequantize, values, scales, zeros=zeros, **form).result


def concat_rows(rw: Rewriter, rows: Sequence[Value]) -> Value:
    """Weights, of one form, or biases, one below the other; one alone stays as it is."""
    if len(rows) == 1:
        return rows[0]
    return by_part(rw, rows, lambda parts: rw.create(Concat, *parts, axis=0).result)
