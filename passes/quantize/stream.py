"""The residual streams of a function: what writes to them, what reads them, and what keeps them from being rotated.

A stream is a set of values of one width, closed under sums, scalar factors and ops that only move rows. A rotation of
it goes into the weights of what writes to it and of what reads it, where all of these are known.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field

from xllm_compiler.analysis.weights import unrounded, weight_exprs
from xllm_compiler.ir.core import Func, Op, ReturnOp, Value
from xllm_compiler.ir.ops import (
    Add,
    AddRmsNorm,
    Cast,
    Dequantize,
    Div,
    Embedding,
    Expand,
    LayerNorm,
    Linear,
    LinearGlu,
    Mul,
    Neg,
    Reshape,
    RmsNorm,
    Rotate,
    Slice,
    Sub,
    Take,
    Transpose,
)

Layer = Linear | LinearGlu
Norm = RmsNorm | LayerNorm | AddRmsNorm


@dataclass
class Stream:
    """One residual stream. `layers` that read it: each with the norm between, None where there is none. `writers`:
    layers whose results are added to it, tables that are looked up in, and sums with constants. `obstacles`: what keeps
    it from being rotated, with the reason; then the rest may be incomplete."""

    width: int
    values: dict[Value, None] = field(default_factory=dict)
    norms: dict[Norm, None] = field(default_factory=dict)
    layers: dict[Layer, Norm | None] = field(default_factory=dict)
    writers: dict[Op, None] = field(default_factory=dict)
    obstacles: list[tuple[Op, str]] = field(default_factory=list)

    @property
    def centred(self) -> bool:
        """Whether the norms that read it subtract the mean of it."""
        return any(isinstance(norm, LayerNorm) for norm in self.norms)

    @property
    def rotated(self) -> bool:
        """Whether that is done already."""
        return any(isinstance(unrounded(v).op, Rotate) for op in self.writers for v in op.operands)


def streams_of(func: Func) -> list[Stream]:
    """The streams that begin at an embedding and are read by a norm, in order."""
    fixed = weight_exprs(func)
    found: list[Stream] = []
    for op in func.ops:
        if not isinstance(op, Embedding) or not op.result.tensor.is_float or not op.w.shape[1].is_const:
            continue
        if op.result in fixed or any(op.result in stream.values for stream in found):
            continue
        found.append(_Search(func, op.w.shape[1].value, fixed).run(op.result))
    return [stream for stream in found if stream.norms]


class _Search:
    """Follows values of one stream to all that writes to it and reads it."""

    def __init__(self, func: Func, width: int, fixed: Container[Value]) -> None:
        self.stream = Stream(width)
        self._ops = func.ops
        self._fixed = fixed
        self._work: list[Value] = []

    def run(self, start: Value) -> Stream:
        """The stream that `start` belongs to."""
        self._work.append(start)
        while self._work:
            v = self._work.pop()
            if v not in self.stream.values:
                self.stream.values[v] = None
                self._defined(v)
                for user, index in v.uses:
                    self._used(v, user, index)
        for norm in self.stream.norms:
            self._read_through(norm)
        if self.stream.centred:
            for layer, between in self.stream.layers.items():
                if not isinstance(between, LayerNorm):
                    self._refuse(layer, "reads the mean of the stream too, which layer norms elsewhere need gone")
        ops = self._ops
        self.stream.obstacles.sort(key=lambda each: len(ops) if isinstance(each[0], ReturnOp) else ops.order(each[0]))
        return self.stream

    def _refuse(self, op: Op, why: str) -> None:
        self.stream.obstacles.append((op, why))

    def _defined(self, v: Value) -> None:
        op = v.op
        if isinstance(op, Embedding):
            if self._known(op, op.w):
                self.stream.writers[op] = None
        elif isinstance(op, Linear):
            self._written_by(op)
        elif isinstance(op, (Add, Sub)):
            self._summed(op)
        elif isinstance(op, AddRmsNorm) and v is op.results[1]:
            self._work += [op.x, op.res]
        elif isinstance(op, (RmsNorm, LayerNorm, AddRmsNorm)):
            self._refuse(
                op, "is a norm that writes to it: its weight is for single directions, and every step would rotate them"
            )
        elif op is not None and (index := self._moved(op)) is not None:
            self._work.append(op.operands[index])
        else:
            self._refuse(v.owner if isinstance(v.owner, Op) else v.owner.ret, "does not leave sums as they are")

    def _written_by(self, op: Linear) -> None:
        if op.act != "none":
            self._refuse(op, "writes to it through an activation")
        elif op.partial:
            self._refuse(op, "writes a partial sum to it")
        elif self._known(op, op.w) and (op.bias is None or self._known(op, op.bias)):
            self.stream.writers[op] = None
            if op.residual is not None:
                self._work.append(op.residual)

    def _summed(self, op: Add | Sub) -> None:
        for v in op.operands:
            if v in self._fixed:
                if v.tensor.rank in (1, 2) and self._wide(v) and self._known(op, v):
                    self.stream.writers[op] = None
                else:
                    self._refuse(op, "adds a constant to all directions")
            elif self._wide(v):
                self._work.append(v)
            else:
                self._refuse(op, "adds one value to all directions")

    def _used(self, v: Value, user: Op, index: int) -> None:
        match user:
            case Linear() if v is user.residual:
                self._work.append(user.result)
                if v in (user.x, user.w, user.bias):
                    self._refuse(user, "reads it twice")
            case Linear() | LinearGlu() if index == 0:
                self._read_by(user, None)
            case Add() | Sub():
                self._work.append(user.result)
            case AddRmsNorm() if index < 2:
                self._work.append(user.results[1])
                self.stream.norms[user] = None
            case RmsNorm() | LayerNorm() if index == 0:
                self.stream.norms[user] = None
            case ReturnOp():
                self._refuse(user, "returns it as it is")
            case _ if self._moved(user) == index:
                self._work.append(user.result)
            case _:
                self._refuse(user, "reads single directions of it")

    def _read_through(self, norm: Norm) -> None:
        """What reads the result of a norm, which loses its weight."""
        if any(v not in self._fixed for v in _vectors(norm)):
            self._refuse(norm, "has a weight that is computed in the step")
        shifted = isinstance(norm, LayerNorm) and norm.b is not None
        work = [norm.results[0]]
        while work:
            v = work.pop()
            for user, index in v.uses:
                if isinstance(user, (Linear, LinearGlu)) and index == 0 and v is not getattr(user, "residual", None):
                    self._read_by(user, norm)
                elif self._moved(user) == index and not (shifted and isinstance(user, (Mul, Div, Neg))):
                    work.append(user.result)
                else:
                    self._refuse(user, "takes what a norm makes of it, and not as the input of a layer")

    def _read_by(self, op: Layer, norm: Norm | None) -> None:
        if isinstance(op, Linear) and op.partial:
            self._refuse(op, "makes a partial sum of it")
        elif self._known(op, op.w) and (op.bias is None or self._known(op, op.bias)):
            self.stream.layers[op] = norm

    def _known(self, op: Op, w: Value) -> bool:
        """Whether the weight `w` of `op` can be computed anew; else it is an obstacle."""
        if w not in self._fixed:
            self._refuse(op, "has a weight that is computed in the step")
            return False
        if isinstance(w.op, Dequantize):
            self._refuse(op, "has a weight that comes quantized")
            return False
        return True

    def _wide(self, v: Value) -> bool:
        return v.tensor.rank > 0 and v.shape[-1].is_const and v.shape[-1].value == self.stream.width

    def _moved(self, op: Op) -> int | None:
        """The operand whose rows `op` picks, moves, casts or multiplies by one factor; None where it does otherwise."""
        match op:
            case Cast() | Neg():
                index = 0
            case Mul() | Div():
                index = 1 if isinstance(op, Mul) and self._one(op.a) else 0
                if not self._one(op.operands[1 - index]):
                    return None
            case Take() | Slice():
                index = 0
                if op.axis == op.x.tensor.rank - 1:
                    return None
            case Transpose():
                index = 0
                if op.perm[-1] != op.x.tensor.rank - 1:
                    return None
            case Reshape() | Expand():
                index = 0
            case _:
                return None
        x, y = op.operands[index], op.results[0]
        return index if x.tensor.is_float and y.tensor.is_float and self._wide(x) and self._wide(y) else None

    def _one(self, v: Value) -> bool:
        return v in self._fixed and all(d.is_const and d.value == 1 for d in v.shape)


def _vectors(norm: Norm) -> list[Value]:
    found = [norm.w, norm.b if isinstance(norm, LayerNorm) else None]
    return [v for v in found if v is not None]
