"""What one kernel costs that computes several ops: the ops' own costs, less what stays inside. Owns that subtraction.

The counting rules are those of `ir/cost.py`; for a single op the result is its cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from xllm_compiler.analysis.cost import Costs
from xllm_compiler.ir.core import Op, Value
from xllm_compiler.ir.cost import Cost
from xllm_compiler.ir.types import Tensor


def kernel_cost(costs: Costs, ops: Sequence[Op]) -> Cost:
    """The cost of one kernel for `ops`, in their order in the function.

    A value that only they use never reaches memory, and what two of them read whole is read once. A single view costs a
    copy: it has a kernel only where the plan wants its bytes somewhere else.
    """
    if len(ops) == 1:
        (op,) = ops
        if not op.SPEC.view:
            return costs.of[op]
        return Cost(read=op.operands[0].tensor.nbytes, written=op.result.tensor.nbytes)
    together = set(ops)
    total, seen = Cost(free=True), set[Value]()
    for op in ops:
        cost = costs.of[op]
        if cost.free:
            continue
        read, written, weights = cost.read, cost.written, cost.weights
        table = op.field(op.SPEC.gathers)[0] if op.SPEC.gathers else None
        for operand in dict.fromkeys(op.operands):
            if not isinstance(operand.type, Tensor):
                continue
            source = _source(operand, together)
            partial = operand is table
            known = operand in costs.weights
            part = op.results[0].tensor.nbytes if partial else operand.tensor.nbytes
            if source.op in together or (not partial and source in seen):
                weights, read = (weights - part, read) if known else (weights, read - part)
            elif not partial:
                seen.add(source)
        for value in op.results:
            if isinstance(value.type, Tensor) and not _escapes(value, together):
                written = written - value.tensor.nbytes
        total = replace(
            total,
            read=total.read + read,
            written=total.written + written,
            weights=total.weights + weights,
            kv_read=total.kv_read + cost.kv_read,
            kv_written=total.kv_written + cost.kv_written,
            flops=total.flops + cost.flops,
            comm=total.comm + cost.comm,
            hops=total.hops + cost.hops,
            free=False,
        )
    return total


def _source(value: Value, together: set[Op]) -> Value:
    """What a value really is where views among `together` renamed it."""
    while value.op is not None and value.op in together and value.op.SPEC.view:
        value = value.op.operands[0]
    return value


def _escapes(value: Value, together: set[Op]) -> bool:
    """Whether somebody outside `together` reads the value, be it through a view inside."""
    return any(
        user not in together or (user.SPEC.view and any(_escapes(r, together) for r in user.results))
        for user in value.users
    )
