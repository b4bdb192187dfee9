"""Quantized weights and linear layers on them. Owns their shape rules and reference meanings (numbers: ir/quant.py).

`format` is the name of a weight format (weight_formats.py), which says what integers, scales and zero points there are.
`rotate` is the length of the blocks along `in` that are rotated (ir/quant.py), 0 for none. `group` and `by_group` of
rows are those of the format that they will meet.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np

from xllm_compiler.dims import Dim, as_dim
from xllm_compiler.errors import XllmError
from xllm_compiler.ir import orthogonal, quant
from xllm_compiler.ir.core import Op, Value
from xllm_compiler.ir.cost import Cost, CostContext, NarrowWeight
from xllm_compiler.ir.diag import IrError
from xllm_compiler.ir.facts import Noise, Work
from xllm_compiler.ir.opdef import DType, Operand, OptOperand, op
from xllm_compiler.ir.ops.nn import Activation, check_norm_vector
from xllm_compiler.ir.rows import AlongAxis, LastAxis
from xllm_compiler.ir.semantics import Array, EvalContext, activation, layer_norm, rms_norm
from xllm_compiler.ir.shapes import no_partial, require_float, require_rank, require_same_dim, require_shape
from xllm_compiler.ir.types import DTYPE_BYTES, FLOATS, Tensor, Type
from xllm_compiler.weight_formats import ROTATIONS, STEP, RowFormat, WeightFormat, parse_format


def format_of(op: Op, name: str) -> WeightFormat:
    """The weight format that `op` calls `name`. Raises IrError where there is none."""
    try:
        return parse_format(name)
    except XllmError as error:
        raise IrError(f"{op.name}: {error.message}", help=error.help) from None


def _row_format(op: Op, group: int, by_group: bool) -> RowFormat:
    if group < 0 or group % STEP:
        raise IrError(f"{op.name}: groups of {group}", help=f"0 for whole rows, or a multiple of {STEP}")
    if by_group and not group:
        raise IrError(f"{op.name}: a scale for each group, and no groups", help="group: that of the weights")
    return RowFormat(group, by_group)


def _check_rotation(op: Op, in_: Dim, rotate: int) -> None:
    if rotate and (rotate not in ROTATIONS or not in_.is_const or in_.value % rotate):
        known = ", ".join(map(str, ROTATIONS))
        raise IrError(f"{op.name}: rotates blocks of {rotate} of {in_}", help=f"{known}, and whole blocks")


def _check_weight(op: Op, values: Value, scales: Value, zeros: Value | None, name: str) -> WeightFormat:
    """The format of a weight whose parts fit it."""
    format = format_of(op, name)
    require_rank(op, values, 2)
    out, in_ = values.shape
    if values.dtype != "u8":
        raise IrError(f"{op.name}: values are {values.type}", help="stored values are u8")
    if scales.dtype != format.scale_dtype:
        raise IrError(f"{op.name}: scales of {format} are {scales.type}", help=f"they are {format.scale_dtype}")
    require_shape(op.scope, scales.shape, [out, format.groups(in_)], f"{op.name}: scales")
    if (zeros is not None) != format.zeros:
        raise IrError(f"{op.name}: {format} {'has' if format.zeros else 'has no'} zeros", help="z at the name's end")
    if zeros is not None:
        if zeros.dtype != "u8":
            raise IrError(f"{op.name}: zeros are {zeros.type}", help="zero points are u8")
        require_shape(op.scope, zeros.shape, scales.shape, f"{op.name}: zeros")
    return format


@op("quant.rotate")
class Rotate(Op):
    """y = (w * (scale + offset) - mean) Q, for every vector of w [a] or [a, b] along `axis`.

    Q is the orthogonal matrix of that width (ir/orthogonal.py). Without `scale` there is no factor, and the mean is
    subtracted with `centre` alone. y is in f32 (f64 where w is), whatever the dtype of w, and so is rounded once where
    it is quantized.
    """

    rows = AlongAxis()
    noise = Noise.ROUNDS
    work = Work.HEAVY
    w: Operand
    scale: OptOperand
    axis: int
    offset: float = 0.0
    centre: bool = False

    def infer(self) -> tuple[Type, ...]:
        no_partial(self)
        require_float(self, self.w, self.scale)
        w = self.w.tensor
        if w.rank not in (1, 2) or not 0 <= self.axis < w.rank:
            raise IrError(f"quant.rotate of {w} along axis {self.axis}", help="a weight of rank 1 or 2, and an axis")
        width = w.shape[self.axis]
        if not width.is_const or width.value < 1:
            raise IrError(f"quant.rotate: vectors of {width} values", help="the width is a number, at least 1")
        if self.scale is not None:
            require_shape(self.scope, self.scale.shape, [width], f"quant.rotate: scale %{self.scale.name}")
        if self.offset and self.scale is None:
            raise IrError("quant.rotate: an offset and no scale", help="offset is added to the scale")
        return (w.with_(dtype="f64" if w.dtype == "f64" else "f32"),)

    def cost(self, ctx: CostContext) -> Cost:
        """A factor, halvings, and a dense product for what of the width is odd."""
        width = self.w.shape[self.axis].value
        two = width & -width
        each = 2 + (two.bit_length() - 1) + (0 if width == two else 2 * width // two) + 2 * self.centre
        return ctx.count(self, flops=each * self.w.tensor.elements)

    def interp(self, ctx: EvalContext, w: Array, scale: Array | None) -> Array:
        wide = np.float64 if ctx.precise or w.dtype == np.float64 else np.float32
        return orthogonal.rotated(w, self.axis, wide, scale, self.offset, self.centre)


@op("quant.weight")
class QuantWeight(Op):
    """(stored, scales[, zeros]) of w [out, in], rotated along `in` and rounded as `format` says."""

    rows = LastAxis()
    noise = Noise.EXACT
    work = Work.HEAVY
    w: Operand
    format: str
    rotate: int = 0

    def infer(self) -> tuple[Type, ...]:
        format = format_of(self, self.format)
        no_partial(self)
        require_float(self, self.w)
        require_rank(self, self.w, 2)
        out, in_ = self.w.shape
        _check_rotation(self, in_, self.rotate)
        shape = (out, format.groups(in_))
        made: list[Type] = [Tensor("u8", self.w.shape), Tensor(format.scale_dtype, shape)]
        return (*made, Tensor("u8", shape)) if format.zeros else tuple(made)

    def cost(self, ctx: CostContext) -> Cost:
        return ctx.count(self, flops=(4 + self.rotate.bit_length()) * self.w.tensor.elements)

    def interp(self, ctx: EvalContext, w: Array) -> tuple[Array, ...]:
        return quant.quantize_weight(quant.rotate(ctx.up(w), self.rotate), format_of(self, self.format))

    def default_hint(self, index: int) -> str:
        return ("stored", "scales", "zeros")[index]


def _stored_values(values: Value, format: WeightFormat) -> Dim:
    """Bytes that kernels read of stored values, whatever the IR's type says."""
    out, in_ = values.shape
    return out * format.row_bytes(in_)


@op("quant.dequantize")
class Dequantize(NarrowWeight):
    """What values stand for, (values - zero) * scale by group, [out, in], rotated back, in `dtype`."""

    rows = LastAxis("scales", "zeros")
    noise = Noise.ROUNDS
    work = Work.LIGHT
    values: Operand
    scales: Operand
    zeros: OptOperand
    format: str
    rotate: int = 0
    dtype: DType = "bf16"

    def infer(self) -> tuple[Type, ...]:
        _check_weight(self, self.values, self.scales, self.zeros, self.format)
        _check_rotation(self, self.values.shape[1], self.rotate)
        if self.dtype not in FLOATS:
            raise IrError(f"quant.dequantize to {self.dtype}")
        return (Tensor(self.dtype, self.values.shape),)

    def cost(self, ctx: CostContext) -> Cost:
        return ctx.count(self, flops=(2 + self.rotate.bit_length()) * self.values.tensor.elements)

    def stored_bytes(self) -> Dim:
        table = self.scales.tensor.nbytes + (self.zeros.tensor.nbytes if self.zeros else as_dim(0))
        return _stored_values(self.values, format_of(self, self.format)) + table

    def stored_row_bytes(self) -> Dim:
        table = (self.scales, self.zeros) if self.zeros else (self.scales,)
        heads = sum(self.scales.shape[1].value * DTYPE_BYTES[v.dtype] for v in table)
        return format_of(self, self.format).row_bytes(self.values.shape[1]) + heads

    def interp(self, ctx: EvalContext, values: Array, scales: Array, zeros: Array | None) -> Array:
        wide = np.float64 if ctx.precise else np.float32
        format = format_of(self, self.format)
        return quant.rotate(quant.dequantize_weight(values, scales, zeros, format, wide), self.rotate)


def _row_types(op: Op, x: Value, group: int, by_group: bool) -> tuple[Type, ...]:
    *rows, in_ = x.shape
    format = _row_format(op, group, by_group)
    groups = (*rows, format.groups(in_))
    return (
        Tensor("i8", (*rows, format.padded(in_))),
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
        return quant.quantize_rows(quant.rotate(ctx.up(x), self.rotate), RowFormat(self.group, self.by_group))

    def default_hint(self, index: int) -> str:
        return ("rows", "row_scale", "row_sums")[index]


@op("quant.norm_rows")
class QuantNormRows(Op):
    """quant.rows of nn.rms_norm or nn.layer_norm of x: the norm is rounded to x's dtype, then each row to 8 bits.

    `offset` is that of nn.rms_norm, `b` that of nn.layer_norm. The rounded norm is rotated as quant.rows does it.
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
    rotate: int = 0
    by_group: bool = False

    def infer(self) -> tuple[Type, ...]:
        no_partial(self)
        check_norm_vector(self, self.x, self.w, "w")
        check_norm_vector(self, self.x, self.b, "b")
        _check_rotation(self, self.x.shape[-1], self.rotate)
        if self.kind == "rms" and self.b is not None:
            raise IrError("quant.norm_rows: an RMS norm has no b", help="kind=layer")
        if self.kind == "layer" and self.offset:
            raise IrError("quant.norm_rows: a layer norm has no offset", help="kind=rms")
        return _row_types(self, self.x, self.group, self.by_group)

    def cost(self, ctx: CostContext) -> Cost:
        """Those of the norm and of quant.rows."""
        norm = 8 if self.kind == "rms" else 11
        return ctx.count(self, flops=(norm + self.rotate.bit_length()) * self.x.tensor.elements)

    def interp(self, ctx: EvalContext, x: Array, w: Array | None, b: Array | None) -> tuple[Array, ...]:
        wide, w, b = ctx.up(x), None if w is None else ctx.up(w), None if b is None else ctx.up(b)
        y = rms_norm(wide, w, self.eps, self.offset) if self.kind == "rms" else layer_norm(wide, w, b, self.eps)
        stored = ctx.up(ctx.store(y, self.x.type))
        return quant.quantize_rows(quant.rotate(stored, self.rotate), RowFormat(self.group, self.by_group))

    def default_hint(self, index: int) -> str:
        return ("rows", "row_scale", "row_sums")[index]


def _check_linear(
    op: Op, x: Value, scale: Value, sums: Value, values: Value, format: WeightFormat, bias: Value | None
) -> None:
    in_ = values.shape[1]
    rows = x.shape[:-1]
    form = format.rows
    if form is None:
        raise IrError(f"{op.name}: {format} meets no rows of 8 bits", help="quant.dequantize and nn.linear")
    if (x.dtype, scale.dtype, sums.dtype) != ("i8", "f32", "i32"):
        raise IrError(f"{op.name} of {x.type}, {scale.type}, {sums.type}", help="quant.rows makes i8, f32 and i32")
    require_same_dim(op.scope, x.shape[-1], form.padded(in_), f"{op.name}: a row of %{x.name}")
    groups = (*rows, form.groups(in_))
    require_shape(op.scope, scale.shape, groups if form.by_group else rows, f"{op.name}: row scales")
    require_shape(op.scope, sums.shape, groups, f"{op.name}: row sums")
    if bias is not None:
        require_shape(op.scope, bias.shape, [values.shape[0]], f"{op.name}: bias %{bias.name}")


def _product(
    ctx: EvalContext, x: Array, scale: Array, values: Array, scales: Array, zeros: Array | None, format: WeightFormat
) -> Array:
    """Exact integer sums by group, times the group's scale, added up, times the row's scale; or times both scales and
    added up."""
    in_ = values.shape[1]
    wide = np.float64 if ctx.precise else np.float32
    w = quant.dequantize_weight(values, scales, zeros, format, np.float64)
    if format.rows is not None and format.rows.by_group:
        each = np.repeat(scale.astype(np.float64), format.rows.group, axis=-1)[..., :in_]
        return np.asarray(np.matmul(x[..., :in_] * each, w.T).astype(wide))
    y = np.matmul(x[..., :in_].astype(np.float64), w.T)
    return np.asarray(y.astype(wide) * scale[..., None].astype(wide))


def _product_cost(op: QuantLinear | QuantLinearGlu, ctx: CostContext, extras: int) -> Cost:
    """Integer products and sums by group count like others; each group's sum is scaled, by the row's scale too where
    that is the group's, and added once. `extras`: further operations for each element of the result."""
    out, in_ = op.values.shape
    rows = op.sums.tensor.elements // op.scales.shape[1]
    format = format_of(op, op.format)
    each = 2 * in_ + (3 if format.rows is not None and format.rows.by_group else 2) * op.scales.shape[1]
    bias = rows * out if op.bias is not None else as_dim(0)
    cost = ctx.count(op, flops=rows * out * each + bias + extras * op.result.tensor.elements)
    spare = op.values.tensor.nbytes - _stored_values(op.values, format)
    if op.values in ctx.weights:
        return replace(cost, weights=cost.weights - spare)
    return replace(cost, read=cost.read - spare)


@op("quant.linear")
class QuantLinear(Op):
    """y = act(x @ w.T + bias) + residual, where x is scaled by row, or by group where the format of w asks for that,
    and w is what its values stand for."""

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
    format: str
    act: Activation = "none"
    dtype: DType = "bf16"

    def infer(self) -> tuple[Type, ...]:
        format = _check_weight(self, self.values, self.scales, self.zeros, self.format)
        _check_linear(self, self.x, self.scale, self.sums, self.values, format, self.bias)
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
        y = _product(ctx, x, scale, values, scales, zeros, format_of(self, self.format))
        return self.finish(ctx, y, bias, residual)

    def finish(self, ctx: EvalContext, y: Array, bias: Array | None, residual: Array | None) -> Array:
        """What follows the product `y` [.., out]."""
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
    format: str
    act: Activation = "silu"
    dtype: DType = "bf16"

    def infer(self) -> tuple[Type, ...]:
        format = _check_weight(self, self.values, self.scales, self.zeros, self.format)
        _check_linear(self, self.x, self.scale, self.sums, self.values, format, self.bias)
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
        y = _product(ctx, x, scale, values, scales, zeros, format_of(self, self.format))
        return self.finish(ctx, y, bias)

    def finish(self, ctx: EvalContext, y: Array, bias: Array | None) -> Array:
        """What follows the product `y` [.., out]."""
        if bias is not None:
            y = y + ctx.up(bias)
        half = y.shape[-1] // 2
        return np.asarray(activation(self.act, y[..., :half]) * y[..., half:])
