"""Leaves: checkpoint tensors, constants, counting. Owns `param`, `t.const`, `t.iota`."""

from __future__ import annotations

import numpy as np

from xllm_compiler.dims import Dim
from xllm_compiler.ir.core import Op
from xllm_compiler.ir.cost import Cost, CostContext
from xllm_compiler.ir.diag import IrError
from xllm_compiler.ir.facts import Noise, Work
from xllm_compiler.ir.opdef import DType, Number, op
from xllm_compiler.ir.rows import NoRows
from xllm_compiler.ir.semantics import NP_DTYPE, Array, EvalContext, array_shape
from xllm_compiler.ir.types import FLOATS, INTS, Tensor, Type


@op("param")
class Param(Op):
    """y = the checkpoint tensor (or traced buffer) called `name`; its type is written as the result type."""

    rows = NoRows()
    noise = Noise.EXACT
    work = Work.NONE
    name_: str
    type: Type

    def infer(self) -> tuple[Type, ...]:
        if not isinstance(self.type, Tensor):
            raise IrError(f"param {self.name_!r} must be a tensor, not {self.type}")
        return (self.type,)

    def interp(self, ctx: EvalContext) -> Array:
        if self.name_ not in ctx.params:
            raise IrError(f"no parameter {self.name_!r} was given", op=self)
        x = ctx.params[self.name_]
        want = array_shape(ctx, self.type)
        if x.shape != want:
            raise IrError(f"parameter {self.name_!r} has shape {list(x.shape)}, wanted {list(want)}", op=self)
        assert isinstance(self.type, Tensor)
        if x.dtype != NP_DTYPE[self.type.dtype] and not ctx.precise:
            raise IrError(f"parameter {self.name_!r} is {x.dtype}, wanted {self.type.dtype}", op=self)
        return x

    def default_hint(self, index: int) -> str:
        return self.name_


@op("t.const")
class Const(Op):
    """y = value, a rank-0 scalar. Combined with another tensor elementwise it takes that tensor's dtype, unrounded."""

    rows = NoRows()
    noise = Noise.EXACT
    work = Work.NONE
    value: Number
    dtype: DType = "f32"

    def infer(self) -> tuple[Type, ...]:
        if self.dtype in FLOATS:
            self.attrs["value"] = float(self.value)
        elif self.dtype in INTS:
            if isinstance(self.value, float):
                raise IrError(f"a {self.dtype} constant cannot be {self.value!r}")
            info = np.iinfo(NP_DTYPE[self.dtype])
            if not info.min <= self.value <= info.max:
                raise IrError(f"{self.value} does not fit {self.dtype}")
            self.attrs["value"] = int(self.value)
        elif self.value not in (0, 1):
            raise IrError(f"a bool constant cannot be {self.value!r}")
        else:
            self.attrs["value"] = bool(self.value)
        return (Tensor(self.dtype, ()),)

    def interp(self, ctx: EvalContext) -> Array:
        return np.asarray(self.value, ctx.dtype(self.dtype))

    def default_hint(self, index: int) -> str:
        return "c"


@op("t.iota")
class Iota(Op):
    """y[i] = i for i in 0..size-1."""

    rows = NoRows()
    noise = Noise.EXACT
    work = Work.LIGHT
    size: Dim
    dtype: DType = "i32"

    def infer(self) -> tuple[Type, ...]:
        if self.dtype == "bool":
            raise IrError("t.iota counts in numbers, not in bool")
        if self.scope.prove(self.size) is False:
            raise IrError(f"t.iota of negative size {self.size}")
        return (Tensor(self.dtype, (self.size,)),)

    def cost(self, ctx: CostContext) -> Cost:
        return ctx.count(self, flops=self.result.tensor.elements)

    def interp(self, ctx: EvalContext) -> Array:
        return np.arange(ctx.dim(self.size)).astype(ctx.dtype(self.dtype))
