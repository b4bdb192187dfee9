"""The step function: one call after the other with addreses that are formulas of N, B, S and P. Owns the C interface.

    int32_t xllm_step_<program>(const int64_t *args, int32_t member, int32_t team)

Must not choose kernels or know ops. The numbers of `args` are the contract with the runtime (architecture, section 5).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from tvm.tirx.script.builder import ir as T

from xllm_compiler.dims import Dim
from xllm_compiler.kernels.tir.generic.eval import dim_expr
from xllm_compiler.kernels.tir.native.module import NativeModule
from xllm_compiler.lowering.kernel_registry import Call
from xllm_compiler.lowering.storage import INPUTS, Ref

ARGS: Final = ("arena", "weights", "kv", *INPUTS, "logits", "N", "B", "S", "P", "barrier", "profile")
SIZES: Final = ("N", "B", "S", "P")


def emit_program(
    native: NativeModule, symbol: str, calls: Sequence[Call], meet: Sequence[bool], offsets: Mapping[int, int]
) -> None:
    """Adds a program to a native module. `meet[i]`: a barrier stands before call i. `offsets`: byte offset of every
    weight request in the weight file.

    Where `profile` is not 0 it is an i64[team, calls, 2]: each member's counter at the beginning and end of every call.
    What lies between the end of one call and the beginning of the next is waiting at the barrier."""
    with native.entry(symbol) as (args, member, team):
        value = {name: T.bind(args[i]) for i, name in enumerate(ARGS)}
        sizes = {name: value[name] for name in SIZES}

        def pointer(ref: Ref) -> Any:
            if ref.space == "input":
                return value[INPUTS[ref.index]]
            if ref.space == "weight":
                return value["weights"] + T.int64(offsets[ref.index])
            return value[ref.space] + dim_expr(ref.offset, sizes)

        own = member * T.int32(2 * len(calls))
        for i, (call, wait) in enumerate(zip(calls, meet, strict=True)):
            if wait:
                native.barrier(value["barrier"], team)
            given = [pointer(a) if isinstance(a, Ref) else _size(a, sizes) for a in call.args]
            native.stamp(value["profile"], own + T.int32(2 * i))
            native.call(call.kernel, given, member, team)
            native.stamp(value["profile"], own + T.int32(2 * i + 1))


def _size(dim: Dim, sizes: dict[str, Any]) -> Any:
    return T.Cast("int32", dim_expr(dim, sizes))
