"""Tensor ops that reduce, reshape, index or multiply. Owns their shape rules and reference meanings."""

from __future__ import annotations

from typing import Literal

import numpy as np

from xllm_compiler.dims import Dim, as_dim, ceildiv
from xllm_compiler.ir.core import Op
from xllm_compiler.ir.cost import Cost, CostContext
from xllm_compiler.ir.diag import IrError
from xllm_compiler.ir.facts import Noise, Work
from xllm_compiler.ir.opdef import Operand, Operands, op
from xllm_compiler.ir.rows import Along, Broadcast, Multiplied, Reduced, Reshaped, Taken, Transposed
from xllm_compiler.ir.semantics import Array, EvalContext
from xllm_compiler.ir.shapes import (
    axis_of,
    broadcast,
    explain_dims,
    no_partial,
    product,
    require_float,
    require_int,
    require_le,
    require_same_dim,
    same_dim,
    shape_text,
)
from xllm_compiler.ir.types import Tensor, Type


class _Move(Op):
    """What ops share that put elements elsewhere: a copy, without operations."""

    noise = Noise.MOVES
    work = Work.COPY

    def cost(self, ctx: CostContext) -> Cost:
        return ctx.count(self, flops=0)


@op("t.reduce")
class Reduce(Op):
    """y = sum, mean, max or min of x over `axes`, which stay as 1 with `keep`."""

    rows = Reduced()
    noise = Noise.ROUNDS
    work = Work.LIGHT
    x: Operand
    kind: Literal["sum", "mean", "max", "min"]
    axes: tuple[int, ...]
    keep: bool = False

    def infer(self) -> tuple[Type, ...]:
        no_partial(self)
        x = self.x.tensor
        if x.dtype == "bool":
            raise IrError("t.reduce of bool", help="insert t.cast")
        if self.kind == "mean":
            require_float(self, self.x)
        axes = tuple(sorted({axis_of(a, x.rank) for a in self.axes}))
        if len(axes) != len(self.axes):
            raise IrError(f"t.reduce names an axis twice: {list(self.axes)}")
        self.attrs["axes"] = axes
        if self.keep:
            return (x.with_(shape=[1 if i in axes else d for i, d in enumerate(x.shape)]),)
        return (x.with_(shape=[d for i, d in enumerate(x.shape) if i not in axes]),)

    def cost(self, ctx: CostContext) -> Cost:
        return ctx.count(self, flops=self.x.tensor.elements)

    def interp(self, ctx: EvalContext, x: Array) -> Array:
        up = ctx.up(x)
        match self.kind:
            case "sum":
                return np.asarray(np.sum(up, axis=self.axes, keepdims=self.keep, dtype=up.dtype))
            case "mean":
                return np.asarray(np.mean(up, axis=self.axes, keepdims=self.keep, dtype=up.dtype))
            case "max":
                return np.asarray(np.max(up, axis=self.axes, keepdims=self.keep))
            case "min":
                return np.asarray(np.min(up, axis=self.axes, keepdims=self.keep))


@op("t.softmax")
class Softmax(Op):
    """y = exp(x - max x) / sum of the same, along `axis`."""

    rows = Along()
    noise = Noise.ROUNDS
    work = Work.HEAVY
    x: Operand
    axis: int = -1

    def infer(self) -> tuple[Type, ...]:
        no_partial(self)
        require_float(self, self.x)
        self.attrs["axis"] = axis_of(self.axis, self.x.tensor.rank)
        return (self.x.tensor,)

    def cost(self, ctx: CostContext) -> Cost:
        return ctx.count(self, flops=5 * self.x.tensor.elements)

    def interp(self, ctx: EvalContext, x: Array) -> Array:
        up = ctx.up(x)
        if up.size == 0:
            return up
        e = np.exp(up - np.max(up, axis=self.axis, keepdims=True))
        return np.asarray(e / np.sum(e, axis=self.axis, keepdims=True))


@op("t.cumsum")
class CumSum(Op):
    """y[i] = x[0] + ... + x[i] along `axis`."""

    rows = Along()
    noise = Noise.ROUNDS
    work = Work.LIGHT
    x: Operand
    axis: int

    def infer(self) -> tuple[Type, ...]:
        no_partial(self)
        if self.x.dtype == "bool":
            raise IrError("t.cumsum of bool", help="insert t.cast")
        self.attrs["axis"] = axis_of(self.axis, self.x.tensor.rank)
        return (self.x.tensor,)

    def cost(self, ctx: CostContext) -> Cost:
        return ctx.count(self, flops=self.x.tensor.elements)

    def interp(self, ctx: EvalContext, x: Array) -> Array:
        up = ctx.up(x)
        return np.cumsum(up, axis=self.axis, dtype=up.dtype)


@op("t.reshape", linear=True, view=True)
class Reshape(Op):
    """y = the same elements in row-major order with another shape."""

    rows = Reshaped()
    noise = Noise.MOVES
    work = Work.NONE
    x: Operand
    shape: tuple[Dim, ...]

    def infer(self) -> tuple[Type, ...]:
        have, want = product(self.x.shape), product(self.shape)
        if not same_dim(self.scope, have, want):
            raise IrError(
                f"t.reshape of {self.x.type} to {shape_text(self.shape)}: {have} elements are not provably {want}",
                help=explain_dims(self.scope, have, want),
            )
        return (self.x.tensor.with_(shape=self.shape),)

    def interp(self, ctx: EvalContext, x: Array) -> Array:
        return x.reshape([ctx.dim(d) for d in self.shape])


@op("t.transpose", linear=True)
class Transpose(_Move):
    """y's axis i is x's axis perm[i]."""

    rows = Transposed()
    x: Operand
    perm: tuple[int, ...]

    def infer(self) -> tuple[Type, ...]:
        x = self.x.tensor
        perm = tuple(axis_of(p, x.rank) for p in self.perm)
        if sorted(perm) != list(range(x.rank)):
            raise IrError(f"{list(self.perm)} is not a permutation of the axes of {x}")
        self.attrs["perm"] = perm
        return (x.with_(shape=[x.shape[p] for p in perm]),)

    def interp(self, ctx: EvalContext, x: Array) -> Array:
        return np.transpose(x, self.perm)


@op("t.expand", linear=True)
class Expand(_Move):
    """y = x broadcast to `shape` by numpy's rule."""

    rows = Broadcast()
    x: Operand
    shape: tuple[Dim, ...]

    def infer(self) -> tuple[Type, ...]:
        if len(self.shape) < self.x.tensor.rank:
            raise IrError(f"t.expand of {self.x.type} to the smaller rank of {shape_text(self.shape)}")
        got = broadcast(self.scope, self.x.shape, self.shape, self.name)
        for have, want in zip(got, self.shape, strict=True):
            require_same_dim(self.scope, have, want, f"t.expand of {self.x.type} to {shape_text(self.shape)}")
        return (self.x.tensor.with_(shape=self.shape),)

    def interp(self, ctx: EvalContext, x: Array) -> Array:
        return np.broadcast_to(x, [ctx.dim(d) for d in self.shape])


@op("t.slice", linear=True, gathers="x")
class Slice(_Move):
    """y = x[start:stop:step] along `axis`; 0 <= start <= stop <= size must be provable, step >= 1."""

    rows = Along()
    x: Operand
    axis: int
    start: Dim
    stop: Dim
    step: int = 1

    def infer(self) -> tuple[Type, ...]:
        x = self.x.tensor
        axis = self.attrs["axis"] = axis_of(self.axis, x.rank)
        if self.step < 1:
            raise IrError(f"t.slice with step {self.step}")
        what = f"t.slice of {x}, axis {axis}, {self.start}:{self.stop}"
        require_le(self.scope, as_dim(0), self.start, what)
        require_le(self.scope, self.start, self.stop, what)
        require_le(self.scope, self.stop, x.shape[axis], what)
        shape = list(x.shape)
        size = self.stop - self.start
        shape[axis] = size if self.step == 1 else ceildiv(size, self.step)
        return (x.with_(shape=shape),)

    def interp(self, ctx: EvalContext, x: Array) -> Array:
        index = [slice(None)] * x.ndim
        index[self.axis] = slice(ctx.dim(self.start), ctx.dim(self.stop), self.step)
        return x[tuple(index)]


@op("t.concat", linear=True)
class Concat(_Move):
    """y = the operands one after the other along `axis`; all other Dims must be equal."""

    rows = Along(why="joins along the token axis")
    xs: Operands
    axis: int

    def infer(self) -> tuple[Type, ...]:
        if not self.xs:
            raise IrError("t.concat of nothing")
        first = self.xs[0].tensor
        axis = self.attrs["axis"] = axis_of(self.axis, first.rank)
        total = as_dim(0)
        for v in self.xs:
            t = v.tensor
            if t.dtype != first.dtype or t.rank != first.rank or t.partial != first.partial:
                raise IrError(f"t.concat of {first} and {t}")
            for i, (a, b) in enumerate(zip(first.shape, t.shape, strict=True)):
                if i != axis:
                    require_same_dim(self.scope, a, b, f"t.concat of {first} and {t}, axis {i}")
            total = total + t.shape[axis]
        return (first.with_(shape=[total if i == axis else d for i, d in enumerate(first.shape)]),)

    def interp(self, ctx: EvalContext, xs: tuple[Array, ...]) -> Array:
        return np.concatenate(xs, axis=self.axis)


@op("t.pad")
class Pad(_Move):
    """y = x with `lo` elements of `value` before and `hi` after along `axis`."""

    rows = Along()
    x: Operand
    axis: int
    lo: Dim
    hi: Dim
    value: float = 0.0

    def infer(self) -> tuple[Type, ...]:
        no_partial(self)
        x = self.x.tensor
        axis = self.attrs["axis"] = axis_of(self.axis, x.rank)
        for d in (self.lo, self.hi):
            require_le(self.scope, as_dim(0), d, f"t.pad of {x}")
        if not x.is_float and self.value != int(self.value):
            raise IrError(f"t.pad of {x} with {self.value}")
        shape = [self.lo + d + self.hi if i == axis else d for i, d in enumerate(x.shape)]
        return (x.with_(shape=shape),)

    def interp(self, ctx: EvalContext, x: Array) -> Array:
        shape = list(x.shape)
        lo = ctx.dim(self.lo)
        shape[self.axis] += lo + ctx.dim(self.hi)
        out = np.full(shape, self.value, x.dtype)
        index = [slice(None)] * x.ndim
        index[self.axis] = slice(lo, lo + x.shape[self.axis])
        out[tuple(index)] = x
        return out


@op("t.matmul")
class MatMul(Op):
    """y[..., i, j] = sum over k of a[..., i, k] * b[..., k, j]; leading axes broadcast; f32 accumulation."""

    rows = Multiplied()
    noise = Noise.ROUNDS
    work = Work.DOT
    a: Operand
    b: Operand

    def infer(self) -> tuple[Type, ...]:
        no_partial(self)
        a, b = self.a.tensor, self.b.tensor
        if a.rank < 2 or b.rank < 2:
            raise IrError(f"t.matmul needs ranks of at least 2: {a} and {b}")
        if a.dtype != b.dtype or not a.is_float:
            raise IrError(f"t.matmul needs equal float dtypes: {a} and {b}", help="insert t.cast")
        require_same_dim(self.scope, a.shape[-1], b.shape[-2], f"t.matmul of {a} and {b}, contracted axis")
        lead = broadcast(self.scope, a.shape[:-2], b.shape[:-2], self.name)
        return (Tensor(a.dtype, (*lead, a.shape[-2], b.shape[-1])),)

    def cost(self, ctx: CostContext) -> Cost:
        return ctx.count(self, flops=2 * self.result.tensor.elements * self.a.shape[-1])

    def interp(self, ctx: EvalContext, a: Array, b: Array) -> Array:
        return np.asarray(np.matmul(ctx.up(a), ctx.up(b)))


@op("t.take", gathers="x")
class Take(_Move):
    """y[.., i.., ..] = x[.., idx[i..], ..] along `axis`; indices count from 0 and must be in range."""

    rows = Taken()
    x: Operand
    idx: Operand
    axis: int = 0

    def infer(self) -> tuple[Type, ...]:
        no_partial(self)
        require_int(self, self.idx)
        x = self.x.tensor
        axis = self.attrs["axis"] = axis_of(self.axis, x.rank)
        return (x.with_(shape=(*x.shape[:axis], *self.idx.shape, *x.shape[axis + 1 :])),)

    def interp(self, ctx: EvalContext, x: Array, idx: Array) -> Array:
        check_range(self, idx, x.shape[self.axis])
        return np.take(x, idx, axis=self.axis)


def check_range(op: Op, idx: Array, size: int) -> None:
    """IrError when an index is negative or too large: numpy would wrap the negative ones silently."""
    if idx.size and (int(idx.min()) < 0 or int(idx.max()) >= size):
        bad = int(idx.min()) if int(idx.min()) < 0 else int(idx.max())
        raise IrError(f"{op.name}: index {bad} is out of range for {size} rows", op=op)
