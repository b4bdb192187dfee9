"""What is done before what, when several streams run a function. Owns the order; must not choose streams.

A stream runs its ops in list order. Streams are ordered only by events (what follows a sched.wait comes after what its
record came after) and futures (what follows a comm.wait comes after the whole collective). A collective's start only
issues it: an op that follows the start, on its stream or behind an event, may run while the collective is in flight, so
`done(start)`, the op after which it no longer reads its operand or writes its result, is its comm.wait. Weight
expressions are computed before the step; the function returns when every stream has run dry.
"""

from __future__ import annotations

from collections.abc import Iterable

from xllm_compiler.analysis.weights import weight_exprs
from xllm_compiler.ir.core import Func, Op, Value
from xllm_compiler.ir.types import Future

Clock = tuple[int, ...]  # per stream, how many of its ops


def done(op: Op) -> Op:
    """The op whose end is the end of `op`: the comm.wait of a collective's start, `op` itself otherwise."""
    for r in op.results:
        if isinstance(r.type, Future) and r.has_uses:
            return r.users[0]
    return op


def begun(op: Op) -> Op:
    """The op at which the writing of `op`'s results begins: a collective's start for its comm.wait."""
    if op.operands and isinstance(op.operands[0].type, Future) and op.operands[0].op is not None:
        return op.operands[0].op
    return op


class HappensBefore:
    """A snapshot of one function, in any stage; changing the function makes it stale. One stream: it is list order."""

    def __init__(self, func: Func) -> None:
        self.func = func
        self.weights: dict[Value, None] = weight_exprs(func)
        self._position = {op: i for i, op in enumerate(func.ops)}
        ops = [op for op in self._position if not self._is_weight(op)]
        self.streams: tuple[int, ...] = tuple(sorted({op.stream for op in ops}))
        slot = {s: i for i, s in enumerate(self.streams)}
        self._slot: dict[Op, int] = {}
        self._clock: dict[Op, Clock] = {}
        now: list[Clock] = [tuple([0] * len(slot)) for _ in slot]
        for op in ops:
            at = slot[op.stream]
            clock = now[at]
            source = op.operands[0].op if op.name in ("sched.wait", "comm.wait") else None
            if source is not None and len(slot) > 1:
                clock = tuple(map(max, clock, self.after(source)))
            self._slot[op], self._clock[op] = at, clock
            now[at] = _count(clock, at)

    def _is_weight(self, op: Op) -> bool:
        return bool(op.results) and all(r in self.weights for r in op.results)

    def clock(self, op: Op) -> Clock:
        """Per stream of `streams`, how many of its ops are done before `op` begins, in every legal execution."""
        return self._clock[op]

    def after(self, op: Op) -> Clock:
        """`clock` of an op that begins when `op` is done (for a start: issued)."""
        return _count(self._clock[op], self._slot[op])

    def before(self, a: Op, b: Op) -> bool:
        """Whether `a` is done (a start: issued; ask for `done(a)` otherwise) before `b` begins, in every execution."""
        if a is b or a is self.func.ret:
            return False
        if b is self.func.ret:
            return True
        if a in self._slot and b in self._slot:
            at = self._slot[a]
            return self._clock[b][at] > self._clock[a][at]
        return b in self._slot or (a not in self._slot and self._position[a] < self._position[b])

    def reach(self, ops: Iterable[Op]) -> Clock:
        """The clock of an op that begins when all of `ops` are done, and nothing else need be; of the return: never."""
        out = [0] * len(self.streams)
        for op in ops:
            if op is self.func.ret:
                return tuple([len(self._position) + 1] * len(out))
            if op in self._slot:
                at = self._slot[op]
                out[at] = max(out[at], self._clock[op][at] + 1)
        return tuple(out)

    def settled(self) -> dict[Op, Clock]:
        """For each op that a step runs, what is done before it or anything after it in the list begins."""
        out: dict[Op, Clock] = {}
        nearest: dict[int, Clock] = {}
        for op in reversed(self._clock):
            nearest[self._slot[op]] = self._clock[op]
            out[op] = tuple(map(min, *nearest.values())) if len(nearest) > 1 else self._clock[op]
        return out


def passed(clock: Clock, reach: Clock) -> bool:
    """Whether everything that `reach` stands for is done at `clock`."""
    return all(map(int.__ge__, clock, reach))


def _count(clock: Clock, at: int) -> Clock:
    return (*clock[:at], clock[at] + 1, *clock[at + 1 :])
