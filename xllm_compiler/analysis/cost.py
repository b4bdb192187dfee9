"""What a function's ops cost, and the time that a machine's limits leave for them.

Each op's class says what it costs (`ir/cost.py` has the counting rules); this adds what depends on the function. Weight
expressions cost nothing where they stand, since they are computed while compiling: the op that reads one pays for its
bytes. Views, `param` and waits cost nothing. Owns that and the roofline estimate; must not run anything, and knows
nothing of schedules.

Time is a roofline: an op takes the longest of its operations at the machine's peak, its bytes at the memory's
bandwidth, and its traffic at the link's, plus a fixed cost of starting it (Williams, Waterman and Patterson, "Roofline:
an insightful visual performance model for multicore architectures", CACM 52(4), 2009).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from xllm_compiler.analysis.machine import Machine
from xllm_compiler.analysis.weights import weight_exprs
from xllm_compiler.ir.core import Func, Op
from xllm_compiler.ir.cost import Amounts, Cost, CostContext
from xllm_compiler.ir.facts import Work


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds of one op. `limit` is what they are spent on: "compute", "memory", "link", "launch", or "" for nothing.
    `of_compute` and `of_memory`: shares of the machine's peaks that the op reaches."""

    seconds: float
    limit: str
    of_compute: float
    of_memory: float


def estimate(amounts: Amounts, machine: Machine) -> Estimate:
    """The roofline's seconds for `amounts`."""
    if amounts.free:
        return Estimate(0.0, "", 0.0, 0.0)
    compute, memory = amounts.flops / machine.flops, amounts.bytes / machine.bandwidth
    link = amounts.comm / machine.link + amounts.hops * machine.hop
    longest, limit = max((compute, "compute"), (memory, "memory"), (link, "link"), key=lambda pair: pair[0])
    seconds = longest + machine.launch
    if machine.launch > longest:
        limit = "launch"
    if not seconds:
        return Estimate(0.0, "", 0.0, 0.0)
    return Estimate(seconds, limit, compute / seconds, memory / seconds)


class Costs:
    """The costs of one function's ops; changing the function makes it stale."""

    def __init__(self, func: Func) -> None:
        self.func = func
        self.weights = weight_exprs(func)
        self.of: dict[Op, Cost] = {op: self._cost(op) for op in func.ops}

    def total(self, dims: Mapping[str, int]) -> Amounts:
        """The sum over all ops, in numbers."""
        total = Amounts()
        for cost in self.of.values():
            total = total + cost.at(dims)
        return total

    def seconds(self, dims: Mapping[str, int], machine: Machine) -> float:
        """The ops' estimates, one after the other."""
        return sum(estimate(cost.at(dims), machine).seconds for cost in self.of.values())

    def _cost(self, op: Op) -> Cost:
        if op.work is Work.NONE or (op.results and all(r in self.weights for r in op.results)):
            return Cost(free=True)
        return op.cost(CostContext(self.weights))
