"""When values are in use. Owns live ranges in list order and views; must not decide where buffers go."""

from __future__ import annotations

from dataclasses import dataclass

from xllm_compiler.ir.core import Func, Op, Value


@dataclass(frozen=True, slots=True)
class LiveRange:
    """Positions in the op list, both included. Arguments start at -1; returned values end at the number of ops."""

    start: int
    end: int

    def overlaps(self, other: LiveRange) -> bool:
        """Whether both are in use at some op; an op's operands and results are."""
        return self.start <= other.end and other.start <= self.end


class Liveness:
    """A snapshot of one function; changing the function makes it stale."""

    def __init__(self, func: Func) -> None:
        self.func = func
        self.position: dict[Op, int] = {op: i for i, op in enumerate(func.ops)}
        self._ranges: dict[Value, LiveRange] = {}
        for v in (*func.args, *(r for op in self.position for r in op.results)):
            start = -1 if v.op is None else self.position[v.op]
            end = start
            for user, _ in v.uses:
                end = max(end, self.position.get(user, len(self.position)))
            self._ranges[v] = LiveRange(start, end)

    def range(self, value: Value) -> LiveRange:
        """From definition to last use."""
        return self._ranges[value]

    def live_at(self, op: Op) -> list[Value]:
        """Values in use while `op` runs, its operands and results included, in order of definition."""
        i = self.position[op]
        return [v for v, r in self._ranges.items() if r.start <= i <= r.end]


def view_base(value: Value) -> Value:
    """The value whose bytes `value` is, following views to their source; `value` itself when it is not a view."""
    while value.op is not None and value.op.SPEC.view:
        value = value.op.operands[0]
    return value


def views_of(value: Value) -> list[Value]:
    """All values that are views of `value`, directly or through other views, in breadth-first order of use."""
    out: list[Value] = []
    queue = [value]
    while queue:
        v = queue.pop(0)
        for user in v.users:
            if user.SPEC.view and user.operands[0] is v:
                out += user.results
                queue += user.results
    return out
