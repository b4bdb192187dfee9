"""The state of kernel selection for the CPU: the calls made so far, the weights requested, the places of values.

It knows no op: select_kernels.py and tensor_ops.py do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from xllm_compiler.analysis.weights import weight_exprs
from xllm_compiler.dims import Dim, as_dim
from xllm_compiler.errors import XllmError
from xllm_compiler.ir.core import Func, Module, Op, Value
from xllm_compiler.ir.types import DTYPE_BYTES, Tensor
from xllm_compiler.kernels.tir.codegen.kernel import Kernel
from xllm_compiler.kernels.tir.linear.linear import NEXT, NEXT_BYTES, NEXT_PANELS, Linear, LinearGlu
from xllm_compiler.kernels.tir.linear.vocab import LinearBlockMax
from xllm_compiler.lowering.fuse import Fusion
from xllm_compiler.lowering.kernel_registry import Call, Registry
from xllm_compiler.lowering.storage import Ref, Storage, where
from xllm_compiler.lowering.weight_requests import WeightTable

AnyLinear = Linear | LinearGlu | LinearBlockMax
_WIDENS: Final = frozenset([("bf16", "f32"), ("f16", "f32")])


class Selection:
    """Kernel calls of one program, in order."""

    def __init__(self, func: Func, storage: Storage, fusion: Fusion, weights: WeightTable) -> None:
        self.func, self.storage, self.fusion, self.weights = func, storage, fusion, weights
        self.calls: list[Call] = []
        self.done: set[Op] = set()
        """Ops that the kernel of an earlier op computes too."""
        self.panels = _panel_keys(func.module, weights)

    def ref(self, value: Value, dtype: str | None = None) -> Ref:
        """The place where a kernel reads `value`. A weight in another dtype is stored in the kernel's dtype if that is
        wider; it is never rounded."""
        if not isinstance(value.type, Tensor):
            return self.storage.ref(value)
        wanted = dtype or value.dtype
        weight = value in self.storage.weights
        if wanted != value.dtype and not (weight and (value.dtype, wanted) in _WIDENS):
            raise XllmError(
                "unsupported",
                f"%{value.name} is {value.type} where a kernel needs {wanted}",
                where=where(value.op) if value.op is not None else "",
                help="insert t.cast",
            )
        return self.weight(value, "row", wanted) if weight else self.storage.ref(value)

    def weight(self, value: Value, layout: str, dtype: str | None = None) -> Ref:
        """The place of a weight expression in a layout."""
        index = self.weights.request(value, layout, dtype)
        size = value.tensor.elements * DTYPE_BYTES[dtype or value.dtype]
        return Ref("weight", index, as_dim(0), size)

    def quantized(self, values: Value, scales: Value, zeros: Value | None, layout: str) -> Ref:
        """The place of a quantized weight in a layout."""
        rest = (scales,) if zeros is None else (scales, zeros)
        return Ref("weight", self.weights.request(values, layout, rest=rest), as_dim(0), values.tensor.elements)

    def call_linear(self, op: Op, kernel: AnyLinear, places: list[Ref | Dim], rows: Dim) -> None:
        """Adds the call of a linear layer. `places`: the kernel's arguments up to the next layer's weight. The queues
        are added here; `set_next_weights` sets the next layer's weight."""
        own = _weight_of(kernel, places)
        self.call(op, kernel, [*places, own, self.storage.work_queues(), rows, as_dim(0), as_dim(0)])

    def set_next_weights(self) -> None:
        """Gives every linear layer the weight of the next one, which it prefetches. The last layer prefetches the
        first layer's, for the following step."""
        linears = [(index, call) for index, call in enumerate(self.calls) if NEXT in call.kernel.args]
        for (index, call), (_, after) in zip(linears, linears[1:] + linears[:1], strict=True):
            panels, size = after.kernel.panels
            weight = _weight_of(after.kernel, after.args)
            named = {NEXT: weight, NEXT_PANELS: as_dim(panels), NEXT_BYTES: as_dim(size)}
            args = [named.get(arg, given) for arg, given in zip(call.kernel.args[:-2], call.args, strict=True)]
            self.calls[index] = _make_call(call.op, call.kernel, args)

    def call(self, op: Op, kernel: Kernel, args: list[Ref | Dim]) -> None:
        """Adds a kernel call. The kernel's arguments declare what it reads and writes."""
        self.calls.append(_make_call(op, kernel, args))


def _weight_of(kernel: AnyLinear, args: Sequence[Ref | Dim]) -> Ref | Dim:
    return args[next(i for i, arg in enumerate(kernel.args) if arg.name == "w")]


def _make_call(op: Op, kernel: Kernel, args: Sequence[Ref | Dim]) -> Call:
    declared = kernel.args[:-2]
    if len(args) != len(declared) or any(a.pointer != isinstance(x, Ref) for a, x in zip(declared, args, strict=True)):
        raise XllmError("internal", f"{kernel.describe()} called with {len(args)} arguments", where=where(op))
    refs = [(a, x) for a, x in zip(declared, args, strict=True) if isinstance(x, Ref)]
    reads = tuple(x for a, x in refs if not a.written)
    writes = tuple(x for a, x in refs if a.written)
    return Call(kernel, tuple(args), reads, writes, op)


def rows(value: Value) -> Dim:
    """The number of rows of a tensor: the product of all dimensions but the last."""
    n = as_dim(1)
    for d in value.shape[:-1]:
        n = n * d
    return n


def const_dim(d: Dim, op: Op, what: str) -> int:
    """The value of a dimension that code is specialised to. Raises XllmError("unsupported") if it is symbolic."""
    if not d.is_const:
        raise XllmError("unsupported", f"{op.name}: {what} is {d}, which is not constant", where=where(op))
    return d.value


def _panel_keys(module: Module, weights: WeightTable) -> frozenset[str]:
    """Keys of the weights that any linear layer of any function reads as panels. All functions share one file."""
    found: set[str] = set()
    for func in module.funcs.values():
        fixed = weight_exprs(func)
        layers = [op for op in func.ops if op.name == "nn.linear" and op.operands[1] in fixed]
        found.update(weights.key(op.operands[1]) for op in layers)
    return frozenset(found)


CPU: Registry[Selection] = Registry("cpu")
