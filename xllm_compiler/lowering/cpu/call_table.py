"""The table of a program's kernel calls with their costs, for profiles. It reads a finished selection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from xllm_compiler.analysis.cost import Costs
from xllm_compiler.analysis.kernel_cost import kernel_cost
from xllm_compiler.artifact.calls import CallTable, KernelCost, ProgramCalls
from xllm_compiler.ir.core import Op
from xllm_compiler.ir.facts import Work
from xllm_compiler.ir.types import Kv
from xllm_compiler.kernels.tir.generic.kernels import Generic
from xllm_compiler.lowering.cpu.lowering_context import Selection
from xllm_compiler.lowering.kernel_registry import Call


def call_table(programs: Mapping[str, tuple[Selection, Sequence[bool]]]) -> CallTable:
    """The table of `programs`: for each its selection and, for each call, whether a barrier stands before it."""
    kernels: dict[KernelCost, int] = {}
    tables: dict[str, ProgramCalls] = {}
    for name, (selection, waits) in programs.items():
        costs = Costs(selection.func)
        groups = computed_by(selection)
        rows: list[int] = []
        for call in selection.calls:
            ops = groups[call.op]
            cost = kernel_cost(costs, ops)
            row = KernelCost(
                symbol=call.kernel.symbol,
                ops=tuple(op.name for op in ops),
                arithmetic=_arithmetic(call),
                read=str(cost.read),
                written=str(cost.written),
                weights=str(cost.weights),
                kv_read=str(cost.kv_read),
                kv_written=str(cost.kv_written),
                operations=str(cost.flops),
            )
            rows.append(kernels.setdefault(row, len(kernels)))
        sources = tuple(call.op.loc.describe() for call in selection.calls)
        tables[name] = ProgramCalls(tuple(rows), sources, tuple(int(wait) for wait in waits))
    return CallTable(tuple(kernels), tables)


def computed_by(selection: Selection) -> dict[Op, list[Op]]:
    """For every op with a call, the ops that its kernel computes, itself included, in the function's order."""
    groups: dict[Op, list[Op]] = {call.op: [] for call in selection.calls}
    home: dict[Op, Op] = {}
    for op in selection.func.ops:
        root = selection.fusion.root.get(op, op)
        if root not in groups and op in selection.done:
            # The kernel that computes one of its operands computes this op too.
            root = next((home[v.op] for v in op.operands if v.op is not None and v.op in home), root)
        if root in groups:
            groups[root].append(op)
            home[op] = root
    return groups


def _arithmetic(call: Call) -> str:
    """The dtype in which the kernel multiplies: its operands' where it computes dot products, else f32."""
    if call.op.work is not Work.DOT or isinstance(call.kernel, Generic):  # generic kernels widen what they read
        return "f32"
    first = call.op.operands[0]
    dtype = first.kv.dtype if isinstance(first.type, Kv) else first.dtype
    return dtype if dtype in ("bf16", "i8") else "f32"
