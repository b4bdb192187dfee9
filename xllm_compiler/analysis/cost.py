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
from typing import Final

from xllm_compiler.analysis.weights import weight_exprs
from xllm_compiler.errors import XllmError
from xllm_compiler.ir.core import Func, Op
from xllm_compiler.ir.cost import Amounts, Cost, CostContext
from xllm_compiler.ir.facts import Work


@dataclass(frozen=True, slots=True)
class Machine:
    """Limits per second, and seconds. `flops`: in the dtype of the model; `launch`: of starting one op; `link` and
    `hop`: bandwidth of one rank to its neighbours, in one direction, and the time of one message."""

    name: str
    flops: float
    bandwidth: float
    launch: float
    link: float = 1e9
    hop: float = 1e-5

    def __post_init__(self) -> None:
        for field in ("flops", "bandwidth", "link"):
            if not getattr(self, field) > 0:
                raise XllmError("option", f"machine {self.name}: {field} is {getattr(self, field)}, not above 0")
        if self.launch < 0 or self.hop < 0:
            raise XllmError("option", f"machine {self.name}: a time is negative")


MACHINES: Final = {
    # Two cores of a virtual AMD EPYC (Zen 4) with the bf16 dot product, measured by bench/limits.py; launch: a barrier.
    "cpu": Machine("cpu", flops=448e9, bandwidth=34.2e9, launch=0.2e-6, link=1.25e9, hop=20e-6),
    # NVIDIA's data sheet of the H200 SXM: bf16 without sparsity, HBM3e, NVLink in one direction; launch inside a graph.
    "h200": Machine("h200", flops=989e12, bandwidth=4.8e12, launch=2e-6, link=450e9, hop=2e-6),
}


def machine_of(name: str) -> Machine:
    """The machine called `name`; XllmError of kind "option" names those there are."""
    if name not in MACHINES:
        raise XllmError("option", f"no machine is called {name!r}", help="one of " + ", ".join(MACHINES))
    return MACHINES[name]


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
