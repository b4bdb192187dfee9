"""The interface of an IR function, as callers see it: inputs, outputs and states by name. Owns the way from types to
the specs of `step.interface`; must not know targets, programs or files."""

from __future__ import annotations

from xllm_compiler.errors import XllmError
from xllm_compiler.ir.core import Func, Module
from xllm_compiler.ir.diag import IrError
from xllm_compiler.ir.state import state_args
from xllm_compiler.ir.types import Kv, Tensor
from xllm_compiler.step.interface import KV, Function, State, TensorSpec, ValueRange


def interface_of(func: Func) -> Function:
    """What `func` takes and gives, without programs. An output without a name is `out0`, `out1`, .. by its number.

    Raises kind "ir" where two outputs have one name."""
    inputs = tuple(_spec(a.name, a.tensor, func.ranges.get(a)) for a in func.args if isinstance(a.type, Tensor))
    outputs: list[TensorSpec] = []
    for i, value in enumerate(func.returns):
        if isinstance(value.type, Tensor):
            outputs.append(_spec(func.outputs.get(i, f"out{len(outputs)}"), value.tensor))
    names = [spec.name for spec in outputs]
    if len(set(names)) < len(names):
        raise IrError(f"@{func.name} gives two outputs one name: {', '.join(names)}")
    return Function(inputs, tuple(outputs), tuple(a.name for a in state_args(func)), ())


def states_of(module: Module, layout: str) -> dict[str, State]:
    """The states of all functions by name; functions that name the same one share it. `layout`: of its bytes.

    Raises kind "ir" where two functions mean different memory by one name, "unsupported" for a state that no runtime
    keeps."""
    found: dict[str, State] = {}
    for func in module.funcs.values():
        for arg in state_args(func):
            kv = arg.type
            if not isinstance(kv, Kv):
                raise XllmError(
                    "unsupported",
                    f"@{func.name} keeps %{arg.name}: {kv}, and no runtime has memory for such a state",
                    help="kv<..> is the only state that is served; xllm-run runs the others in the interpreter",
                )
            sizes = {"heads": kv.heads, "k": kv.k_dim, "v": kv.v_dim, "page": kv.page}
            state = State(KV, kv.dtype, layout, sizes, str(kv.pages), kv.page_bytes)
            if found.setdefault(arg.name, state) != state:
                raise IrError(f"@{func.name} has a state %{arg.name}: {kv}, which is another one elsewhere")
    return found


def _spec(name: str, tensor: Tensor, limits: ValueRange | None = None) -> TensorSpec:
    return TensorSpec(name, tensor.dtype, tuple(str(dim) for dim in tensor.shape), limits)
