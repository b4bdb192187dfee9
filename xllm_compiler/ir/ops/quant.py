"""Quantized weights and linear layers on them. Owns their shape rules and reference meanings (numbers: ir/quant.py).

`bits` is 4 or 8; `group` the number of values along `in` that share a scale, 0 for the whole row; `rotate` the length
of the blocks along `in` that are rotated (ir/quant.py), 0 for none; `grid` says of 8 bits with a scale per row that
every `grid` values along `in` lie on a grid of 16 numbers, so that they can be stored in 4 bits; 0: it says nothing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np

from xllm_compiler.dims import Dim, as_dim, ceildiv
from xllm_compiler.ir import quant
from xllm_compiler.ir.core import Op, Value
from xllm_compiler.ir.cost import Cost, CostContext, NarrowWeight
from xllm_compiler.ir.diag import IrError
from xllm_compiler.ir.facts import Noise, Work
from xllm_compiler.ir.opdef import DType, Operand, OptOperand, op
from xllm_compiler.ir.ops.nn import Activation, check_norm_vector
from xllm_compiler.ir.rows import LastAxis
from xllm_compiler.ir.semantics import Array, EvalContext, activation, layer_norm, rms_norm
from xllm_compiler.ir.shapes import no_partial, require_float, require_rank, require_same_dim, require_shape
from xllm_compiler.ir.types import DTYPE_BYTES, FLOATS, Tensor, Type


def _check_form(op: Op, bits: int, group: int, grid: int = 0, zeros: bool = False) -> None:
    if bits not in (4, 8):
        raise IrError(f"{op.name}: {bits} bits", help="4 or 8")
    if group < 0 or group % quant.STEP:
        raise IrError(f"{op.name}: groups of {group}", help=f"0 for whole rows, or a multiple of {quant.STEP}")
    if grid and (grid not in quant.GRIDS or bits != 8 or group or zeros):
        known = " or ".join(map(str, quant.GRIDS))
        raise IrError(f"{op.name}: a grid of {grid}", help=f"{known}, of 8 bits by whole rows without zeros")


def _check_rotation(op: Op, in_: Dim, rotate: int) -> None:
    if rotate and (rotate not in quant.ROTATIONS or not in_.is_const or in_.value % rotate):
        known = ", ".join(map(str, quant.ROTATIONS))
        raise IrError(f"{op.name}: rotates blocks of {rotate} of {in_}", help=f"{known}, and whole blocks")


def _groups(in_: Dim, group: int) -> Dim:
    return ceildiv(in_, group) if group else as_dim(1)


def _padded(in_: Dim, group: int) -> Dim:
    unit = group or quant.STEP
    return unit * ceildiv(in_, unit)


def _check_weight(op: Op, values: Value, scales: Value, zeros: Value | None, group: int) -> None:
    require_rank(op, values, 2)
    out, in_ = values.shape
    if values.dtype != "u8":
        raise IrError(f"{op.name}: values are {values.type}", help="stored values are u8")
    if scales.dtype != quant.scale_dtype(group):
        raise IrError(f"{op.name}: scales of groups of {group} are {scales.type}", help="f16 in groups, f32 for rows")
    require_shape(op.scope, scales.shape, [out, _groups(in_, group)], f"{op.name}: scales")
    if zeros is not None:
        if zeros.dtype != "u8":
            raise IrError(f"{op.name}: zeros are {zeros.type}", help="zero points are u8")
        require_shape(op.scope, zeros.shape, scales.shape, f"{op.name}: zeros")


@op("quant.weight")
class QuantWeight(Op):
    """(stored, scales[, zeros]) of w [out, in], rotated along `in` and rounded: (stored - zero) * scale by group."""

    rows = LastAxis()
    noise = Noise.EXACT
    work = Work.HEAVY
    w: Operand
    bits: int
    group: int = 0
    zeros: bool = False
    rotate: int = 0
    grid: int = 0

    def infer(self) -> tuple[Type, ...]:
        _check_form(self, self.bits, self.group, self.grid, self.zeros)
        no_partial(self)
        require_float(self, self.w)
        require_rank(self, self.w, 2)
        out, in_ = self.w.shape
        _check_rotation(self, in_, self.rotate)
        shape = (out, _groups(in_, self.group))
        made: list[Type] = [Tensor("u8", self.w.shape), Tensor(quant.scale_dtype(self.group), shape)]
        return (*made, Tensor("u8", shape)) if self.zeros else tuple(made)

    def cost(self, ctx: CostContext) -> Cost:
        return ctx.count(self, flops=(4 + self.rotate.bit_length()) * self.w.tensor.elements)

    def interp(self, ctx: EvalContext, w: Array) -> tuple[Array, ...]:
        turned = quant.rotate(ctx.up(w), self.rotate)
        if self.grid:
            return quant.quantize_on_grids(turned, self.grid)
        made = quant.quantize_weight(turned, self.bits, self.group, self.zeros)
        return made if self.zeros else made[:2]

    def default_hint(self, index: int) -> str:
        return ("stored", "scales", "zeros")[index]


def _stored_values(values: Value, bits: int, grid: int) -> Dim:
    """Bytes that kernels read of stored values: at 4 bits and on grids two to a byte, whatever the IR's type says."""
    out, in_ = values.shape
    return out * _row_bytes(in_, bits, grid) if grid else out * in_ * bits // 8


def _row_bytes(in_: Dim, bits: int, grid: int) -> Dim:
    """The same of one row; on grids there is a byte for each run."""
    return ceildiv(in_, 2) + ceildiv(in_, grid) if grid else in_ * bits // 8


@op("quant.dequantize")
class Dequantize(NarrowWeight):
    """(values - zero) * scale, [out, in], rotated back, in `dtype`; without zeros the zero is 2^(bits - 1)."""

    rows = LastAxis("scales", "zeros")
    noise = Noise.ROUNDS
    work = Work.LIGHT
    values: Operand
    scales: Operand
    zeros: OptOperand
    bits: int
    group: int = 0
    rotate: int = 0
    grid: int = 0
    dtype: DType = "bf16"

    def infer(self) -> tuple[Type, ...]:
        _check_form(self, self.bits, self.group, self.grid, self.zeros is not None)
        _check_weight(self, self.values, self.scales, self.zeros, self.group)
        _check_rotation(self, self.values.shape[1], self.rotate)
        if self.dtype not in FLOATS:
            raise IrError(f"quant.dequantize to {self.dtype}")
        return (Tensor(self.dtype, self.values.shape),)

    def cost(self, ctx: CostContext) -> Cost:
        return ctx.count(self, flops=(2 + self.rotate.bit_length()) * self.values.tensor.elements)

    def stored_bytes(self) -> Dim:
        table = self.scales.tensor.nbytes + (self.zeros.tensor.nbytes if self.zeros else as_dim(0))
        return _stored_values(self.values, self.bits, self.grid) + table

    def stored_row_bytes(self) -> Dim:
        table = (self.scales, self.zeros) if self.zeros else (self.scales,)
        heads = sum(self.scales.shape[1].value * DTYPE_BYTES[v.dtype] for v in table)
        return _row_bytes(self.values.shape[1], self.bits, self.grid) + heads

    def interp(self, ctx: EvalContext, values: Array, scales: Array, zeros: Array | None) -> Array:
        wide = np.float64 if ctx.precise else np.float32
        return quant.rotate(quant.dequantize_weight(values, scales, zeros, self.bits, self.group, wide), self.rotate)


def _row_types(op: Op, x: Value, group: int, by_group: bool) -> tuple[Type, ...]:
    *rows, in_ = x.shape
    if by_group and not group:
        raise IrError(f"{op.name}: a scale for each group, and no groups", help="group: that of the weights")
    groups = (*rows, _groups(in_, group))
    return (
        Tensor("i8", (*rows, _padded(in_, group))),
        Tensor("f32", groups if by_group else rows),
        Tensor("i32", groups),
    )


@op("quant.rows")
class QuantRows(Op):
    """(stored i8 [.., padded], scale f32 [..], sums i32 [.., groups]) of x [.., in], each row to -127 .. 127.

    `group` and `rotate` are those of the weights it will meet: rows are rotated in f32 before they are rounded, padded
    to whole groups and summed by group. `by_group`: each group has a scale of its own, f32 [.., groups].
    """

    rows = LastAxis()
    noise = Noise.EXACT
    work = Work.HEAVY
    x: Operand
    group: int = 0
    rotate: int = 0
    by_group: bool = False

    def infer(self) -> tuple[Type, ...]:
        _check_form(self, 8, self.group)
        no_partial(self)
        require_float(self, self.x)
        if self.x.tensor.rank < 1:
            raise IrError("quant.rows of a scalar")
        _check_rotation(self, self.x.shape[-1], self.rotate)
        return _row_types(self, self.x, self.group, self.by_group)

    def cost(self, ctx: CostContext) -> Cost:
        """The largest value, a product and a rounding of each, and their sum. A rotation: its halvings, a product."""
        return ctx.count(self, flops=(4 + self.rotate.bit_length()) * self.x.tensor.elements)

    def interp(self, ctx: EvalContext, x: Array) -> tuple[Array, ...]:
        return quant.quantize_rows(quant.rotate(ctx.up(x), self.rotate), self.group, self.by_group)

    def default_hint(self, index: int) -> str:
        return ("rows", "row_scale", "row_sums")[index]


@op("quant.norm_rows")
class QuantNormRows(Op):
    """quant.rows of nn.rms_norm or nn.layer_norm of x: the norm is rounded to x's dtype, then each row to 8 bits.

    `offset` is that of nn.rms_norm, `b` that of nn.layer_norm.
    """

    rows = LastAxis()
    noise = Noise.EXACT
    work = Work.HEAVY
    x: Operand
    w: OptOperand
    b: OptOperand
    eps: float
    kind: Literal["rms", "layer"] = "rms"
    offset: float = 0.0
    group: int = 0
    by_group: bool = False

    def infer(self) -> tuple[Type, ...]:
        _check_form(self, 8, self.group)
        no_partial(self)
        check_norm_vector(self, self.x, self.w, "w")
        check_norm_vector(self, self.x, self.b, "b")
        if self.kind == "rms" and self.b is not None:
            raise IrError("quant.norm_rows: an RMS norm has no b", help="kind=layer")
        if self.kind == "layer" and self.offset:
            raise IrError("quant.norm_rows: a layer norm has no offset", help="kind=rms")
        return _row_types(self, self.x, self.group, self.by_group)

    def cost(self, ctx: CostContext) -> Cost:
        """Those of the norm and of quant.rows."""
        return ctx.count(self, flops=(8 if self.kind == "rms" else 11) * self.x.tensor.elements)

    def interp(self, ctx: EvalContext, x: Array, w: Array | None, b: Array | None) -> tuple[Array, ...]:
        wide, w, b = ctx.up(x), None if w is None else ctx.up(w), None if b is None else ctx.up(b)
        y = rms_norm(wide, w, self.eps, self.offset) if self.kind == "rms" else layer_norm(wide, w, b, self.eps)
        return quant.quantize_rows(ctx.up(ctx.store(y, self.x.type)), self.group, self.by_group)

    def default_hint(self, index: int) -> str:
        return ("rows", "row_scale", "row_sums")[index]


def _check_linear(
    op: Op, x: Value, scale: Value, sums: Value, values: Value, bits: int, group: int, bias: Value | None
) -> None:
    in_ = values.shape[1]
    rows = x.shape[:-1]
    if (x.dtype, scale.dtype, sums.dtype) != ("i8", "f32", "i32"):
        raise IrError(f"{op.name} of {x.type}, {scale.type}, {sums.type}", help="quant.rows makes i8, f32 and i32")
    require_same_dim(op.scope, x.shape[-1], _padded(in_, group), f"{op.name}: a row of %{x.name}")
    groups = (*rows, _groups(in_, group))
    require_shape(op.scope, scale.shape, groups if quant.rows_by_group(bits, group) else rows, f"{op.name}: row scales")
    require_shape(op.scope, sums.shape, groups, f"{op.name}: row sums")
    if bias is not None:
        require_shape(op.scope, bias.shape, [values.shape[0]], f"{op.name}: bias %{bias.name}")


def _product(
    ctx: EvalContext, x: Array, scale: Array, values: Array, scales: Array, zeros: Array | None, bits: int, group: int
) -> Array:
    """Exact integer sums by group, times the group's scale, added up, times the row's scale; or times both scales and
    added up."""
    in_ = values.shape[1]
    wide = np.float64 if ctx.precise else np.float32
    w = quant.dequantize_weight(values, scales, zeros, bits, group, np.float64)
    if quant.rows_by_group(bits, group):
        each = np.repeat(scale.astype(np.float64), group, axis=-1)[..., :in_]
        return np.asarray(np.matmul(x[..., :in_] * each, w.T).astype(wide))
    y = np.matmul(x[..., :in_].astype(np.float64), w.T)
    return np.asarray(y.astype(wide) * scale[..., None].astype(wide))


def _product_cost(op: QuantLinear | QuantLinearGlu, ctx: CostContext, extras: int) -> Cost:
    """Integer products and sums by group count like others; each group's sum is scaled, by the row's scale too where
    that is the group's, and added once. `extras`: further operations for each element of the result."""
    out, in_ = op.values.shape
    rows = op.sums.tensor.elements // op.scales.shape[1]
    each = 2 * in_ + (3 if quant.rows_by_group(op.bits, op.group) else 2) * op.scales.shape[1]
    bias = rows * out if op.bias is not None else as_dim(0)
    cost = ctx.count(op, flops=rows * out * each + bias + extras * op.result.tensor.elements)
    spare = op.values.tensor.nbytes - _stored_values(op.values, op.bits, op.grid)
    if op.values in ctx.weights:
        return replace(cost, weights=cost.weights - spare)
    return replace(cost, read=cost.read - spare)


@op("quant.linear")
class QuantLinear(Op):
    """y = act(x @ w.T + bias) + residual, where x is scaled by row, or by group where w has 8 bits in groups, and w is
    (values - zero) * scales by group."""

    rows = LastAxis("scale", "sums", "residual")
    noise = Noise.ROUNDS
    work = Work.DOT
    x: Operand
    scale: Operand
    sums: Operand
    values: Operand
    scales: Operand
    zeros: OptOperand
    bias: OptOperand
    residual: OptOperand
    bits: int
    group: int = 0
    grid: int = 0
    act: Activation = "none"
    dtype: DType = "bf16"

    def infer(self) -> tuple[Type, ...]:
        _check_form(self, self.bits, self.group, self.grid, self.zeros is not None)
        _check_weight(self, self.values, self.scales, self.zeros, self.group)
        _check_linear(self, self.x, self.scale, self.sums, self.values, self.bits, self.group, self.bias)
        shape = (*self.x.shape[:-1], self.values.shape[0])
        for v in (self.bias, self.residual):
            if v is not None and v.dtype != self.dtype:
                raise IrError(f"quant.linear: %{v.name} is {v.type}, the result is {self.dtype}")
        if self.residual is not None:
            require_shape(self.scope, self.residual.shape, shape, f"quant.linear: residual %{self.residual.name}")
        return (Tensor(self.dtype, shape),)

    def cost(self, ctx: CostContext) -> Cost:
        extras = (self.residual is not None) + (self.act != "none")
        return _product_cost(self, ctx, extras)

    def interp(
        self,
        ctx: EvalContext,
        x: Array,
        scale: Array,
        sums: Array,
        values: Array,
        scales: Array,
        zeros: Array | None,
        bias: Array | None,
        residual: Array | None,
    ) -> Array:
        y = _product(ctx, x, scale, values, scales, zeros, self.bits, self.group)
        if bias is not None:
            y = y + ctx.up(bias)
        y = activation(self.act, y)
        return y if residual is None else y + ctx.up(residual)


@op("quant.linear_glu")
class QuantLinearGlu(Op):
    """y = act(g) * u, where g and u are the halves of the columns of x @ w.T + bias (see quant.linear)."""

    rows = LastAxis("scale", "sums")
    noise = Noise.ROUNDS
    work = Work.DOT
    x: Operand
    scale: Operand
    sums: Operand
    values: Operand
    scales: Operand
    zeros: OptOperand
    bias: OptOperand
    bits: int
    group: int = 0
    grid: int = 0
    act: Activation = "silu"
    dtype: DType = "bf16"

    def infer(self) -> tuple[Type, ...]:
        _check_form(self, self.bits, self.group, self.grid, self.zeros is not None)
        _check_weight(self, self.values, self.scales, self.zeros, self.group)
        _check_linear(self, self.x, self.scale, self.sums, self.values, self.bits, self.group, self.bias)
        if self.bias is not None and self.bias.dtype != self.dtype:
            raise IrError(f"quant.linear_glu: bias is {self.bias.type}, the result is {self.dtype}")
        half = self.values.shape[0] // 2
        require_same_dim(self.scope, 2 * half, self.values.shape[0], "quant.linear_glu: rows of w in two halves")
        return (Tensor(self.dtype, (*self.x.shape[:-1], half)),)

    def cost(self, ctx: CostContext) -> Cost:
        return _product_cost(self, ctx, 2)

    def interp(
        self,
        ctx: EvalContext,
        x: Array,
        scale: Array,
        sums: Array,
        values: Array,
        scales: Array,
        zeros: Array | None,
        bias: Array | None,
    ) -> Array:
        y = _product(ctx, x, scale, values, scales, zeros, self.bits, self.group)
        if bias is not None:
            y = y + ctx.up(bias)
        half = y.shape[-1] // 2
        return np.asarray(activation(self.act, y[..., :half]) * y[..., half:])
