"""Emits a program: one kernel call after the other, with addresses that are formulas of the sizes.

`step.abi` defines the order of the words that a program reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tvm.tirx.script.builder import ir as T

from xllm_compiler.dims import Dim
from xllm_compiler.kernels.tir.generic.eval import dim_expr
from xllm_compiler.kernels.tir.native.module import NativeModule
from xllm_compiler.lowering.kernel_registry import Call
from xllm_compiler.lowering.storage import Ref
from xllm_compiler.step.abi import ArgumentBlock
from xllm_compiler.step.interface import Function


def emit_program(
    native: NativeModule,
    symbol: str,
    function: Function,
    block: ArgumentBlock,
    calls: Sequence[Call],
    waits: Sequence[bool],
    offsets: Mapping[int, int],
) -> None:
    """Adds a program of `function` to a native module. `waits[i]`: a barrier stands before call i. `offsets`: byte
    offset of every weight request in the weight file.

    Where the word `profile` is not 0 it points at an i64[team, calls, 2], to which each member writes its counter at
    the beginning and end of every call. The time between the end of one call and the beginning of the next is spent
    waiting at the barrier."""
    with native.entry(symbol) as (args, member, team):
        word = [T.bind(args[i]) for i in range(len(block))]
        sizes = {name: word[i] for name, i in block.dims().items()}
        names = {
            "state": function.states,
            "input": [spec.name for spec in function.inputs],
            "output": [spec.name for spec in function.outputs],
        }
        barrier, profile, weights = (word[block.place(space)] for space in ("barrier", "profile", "weights"))

        def pointer(ref: Ref) -> Any:
            if ref.space == "weight":
                return weights + T.int64(offsets[ref.index])
            name = names[ref.space][ref.index] if ref.space in names else ""
            base = word[block.place(ref.space, name)]
            return base if ref.space in names else base + dim_expr(ref.offset, sizes)

        own = member * T.int32(2 * len(calls))
        for i, (call, wait) in enumerate(zip(calls, waits, strict=True)):
            if wait:
                native.barrier(barrier, team)
            given = [pointer(a) if isinstance(a, Ref) else _size(a, sizes) for a in call.args]
            native.stamp(profile, own + T.int32(2 * i))
            native.call(call.kernel, given, member, team)
            native.stamp(profile, own + T.int32(2 * i + 1))


def _size(dim: Dim, sizes: dict[str, Any]) -> Any:
    return T.Cast("int32", dim_expr(dim, sizes))
