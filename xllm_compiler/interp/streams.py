"""Runs functions in random legal orders of their streams. Owns the order; interp.memory detects what an order shows.

    run_interleaved(module, "step", inputs, params, dims, seed=7)

Every stream of every rank is a queue that runs in list order; which of them goes on next is drawn. A sched.wait goes on
when its record has been run, a comm.wait when its collective is complete. A collective is issued by its start, pairs up
with those of the other ranks in the order of issue within its group, reads all operands at a moment drawn later, and
writes the results at another one, rank by rank. How eager streams and collectives are is drawn as well, once per run,
so that some seeds let one stream run far ahead and some leave collectives in flight for as long as they may be.

A sound module gives the results of `run_ranks`, bit for bit, under every seed. One with a missing event, bytes that are
taken too early or collectives that ranks may issue in different orders fails under some seed, with an error that shows
the op, what it found and the last steps that led there. The module need not verify.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import numpy as np

from xllm_compiler.interp.memory import Layout, Memory
from xllm_compiler.interp.run import bind_arguments, call_op, check_shape, contexts, exchange
from xllm_compiler.ir.core import Func, Module, Op, Value
from xllm_compiler.ir.diag import IrError, blame
from xllm_compiler.ir.ops import Collective
from xllm_compiler.ir.printer import print_op
from xllm_compiler.ir.semantics import Array, EvalContext
from xllm_compiler.step.interface import STEP

SHOWN: Final = 8  # steps before an error
ALL: Final = -1  # in place of a rank
_ONE_STREAM: Final = "start all collectives of a group on one stream, or order them with events"


def run_interleaved(
    module: Module,
    func: str = STEP,
    inputs: Mapping[str, Array] | None = None,
    params: Mapping[str, Array] | None = None,
    dims: Mapping[str, int] | None = None,
    *,
    seed: int,
    precise: bool = False,
) -> list[Array]:
    """The returned arrays of one call under the order that `seed` draws; arguments as of `interp.run`."""
    return run_interleaved_ranks(module, func, [inputs or {}], [params or {}], dims, seed=seed, precise=precise)[0]


def run_interleaved_ranks(
    module: Module,
    func: str,
    inputs: Sequence[Mapping[str, Array]],
    params: Sequence[Mapping[str, Array]],
    dims: Mapping[str, int] | None = None,
    *,
    seed: int,
    precise: bool = False,
) -> list[list[Array]]:
    """The same on several ranks, which go on independently of each other; arguments as of `interp.run_ranks`."""
    if module.stage == "graph":
        raise IrError("a module in stage graph has no streams", help="run pass assign-streams, or use interp.run")
    f = module.func(func)
    ranks = contexts(f, inputs, params, dims or {}, precise)
    with np.errstate(all="ignore"):  # inf and NaN are results like others
        run = _Run(f, ranks, [bind_arguments(f, ctx, given) for ctx, given in zip(ranks, inputs, strict=True)], seed)
        run.to_the_end()
    return [[rank.memory.beside[v] for v in f.returns] for rank in run.ranks]


@dataclass(eq=False, slots=True)
class _Rank:
    number: int
    ctx: EvalContext
    memory: Memory
    queues: dict[int, deque[Op]]
    issued: dict[str, list[Collective]] = field(default_factory=dict)
    recorded: set[Value] = field(default_factory=set)


@dataclass(eq=False, slots=True)
class _Exchange:
    """A collective in one group of ranks, of which at least one has issued it. `made`: what each is going to get."""

    op: Collective
    members: tuple[_Rank, ...]
    issuers: list[_Rank] = field(default_factory=list)
    made: list[Array] | None = None
    complete: set[int] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class _Step:
    """Something that may happen next. `weight`: how likely, compared with the others; `what`: "" when `op` runs."""

    weight: float
    rank: int
    op: Op
    what: str
    act: Callable[[], None]


class _Run:
    def __init__(
        self, func: Func, ranks: Sequence[EvalContext], given: Sequence[dict[Value, Array]], seed: int
    ) -> None:
        self.func, self.seed = func, seed
        self.random = random.Random(seed)
        self.layout = Layout(func, ranks[0].dims)
        self.exchanges: dict[tuple[Collective, int], _Exchange] = {}  # by start, and the first rank of the group
        self.in_flight: list[_Exchange] = []
        self.steps: deque[_Step] = deque(maxlen=SHOWN * 2 * len(ranks))
        self.ranks: list[_Rank] = []
        for i, (ctx, env) in enumerate(zip(ranks, given, strict=True)):
            queues = self._load(ctx, env)
            memory = Memory(self.layout if i == 0 else Layout(func, ctx.dims), ctx, env, partial(self._fault, i))
            self.ranks.append(_Rank(i, ctx, memory, queues))
        spread = self.random.choice((0.5, 1.5, 3.0))
        self.eager = {(r.number, s): 10 ** -self.random.uniform(0, spread) for r in self.ranks for s in r.queues}
        self.eager_collectives = 10 ** -self.random.uniform(0, 1 + spread)

    def _load(self, ctx: EvalContext, env: dict[Value, Array]) -> dict[int, deque[Op]]:
        """Computes the weight expressions, which are there before the step, into `env`; the rest waits in queues."""
        queues: dict[int, deque[Op]] = {}
        for op in self.func.ops:
            if op.results and all(r in self.layout.weights for r in op.results):
                for r, out in zip(op.results, call_op(op, ctx, env), strict=True):
                    check_shape(op, r, out, ctx)
                    env[r] = ctx.store(out, r.type)
            else:
                queues.setdefault(op.stream, deque()).append(op)
        return dict(sorted(queues.items()))

    def to_the_end(self) -> None:
        while True:
            choices = self._choices()
            if not choices:
                break
            step = self.random.choices(choices, [c.weight for c in choices])[0]
            self.steps.append(step)
            step.act()
        blocked = [(rank, queue[0]) for rank in self.ranks for queue in rank.queues.values() if queue]
        if blocked:
            text = "; ".join(f"rank {rank.number} stream {op.stream}: {self._why(rank, op)}" for rank, op in blocked)
            raise self._fault(blocked[0][0].number, blocked[0][1], f"deadlock: no stream can go on. {text}", "", True)

    def _choices(self) -> list[_Step]:
        out: list[_Step] = []
        for rank in self.ranks:
            for stream, queue in rank.queues.items():
                if queue and self._may_go_on(rank, op := queue[0]):
                    out.append(
                        _Step(self.eager[rank.number, stream], rank.number, op, "", partial(self._run, rank, op))
                    )
        for c in self.in_flight:
            if c.made is None:
                if len(c.issuers) == len(c.members):
                    out.append(_Step(self.eager_collectives, ALL, c.op, "reads", partial(self._combine, c)))
                continue
            for place, rank in enumerate(c.members):
                if rank.number not in c.complete:
                    done = partial(self._deliver, c, place)
                    out.append(_Step(self.eager_collectives, rank.number, c.op, "completes", done))
        return out

    def _may_go_on(self, rank: _Rank, op: Op) -> bool:
        if op.name == "sched.wait":
            return op.operands[0] in rank.recorded
        if op.name == "comm.wait":
            c = self._waited_for(rank, op)
            return c is not None and rank.number in c.complete
        return True

    # What happens.

    def _run(self, rank: _Rank, op: Op) -> None:
        rank.queues[op.stream].popleft()
        memory = rank.memory
        if isinstance(op, Collective):
            self._issue(rank, op)
            return
        if op.name in ("sched.record", "sched.wait"):
            rank.recorded.update(op.results)
        elif op.name == "comm.wait":
            memory.publish(op.result)
            memory.finish(op)
        else:
            operands = {v: memory.read(op, v) for v in op.operands}
            for r, out in zip(op.results, call_op(op, rank.ctx, operands), strict=True):
                check_shape(op, r, out, rank.ctx)
                memory.claim(op, r)
                memory.write(op, r, rank.ctx.store(out, r.type))
                memory.publish(r)
            memory.finish(op)

    def _members(self, rank: _Rank, op: Collective) -> tuple[_Rank, ...]:
        """The ranks with which `rank` runs a collective."""
        return tuple(self.ranks[m] for m in self.func.module.groups[op.group].members(rank.number))

    def _waited_for(self, rank: _Rank, wait: Op) -> _Exchange | None:
        """The exchange for which `rank` waits, once one of its group has issued it."""
        start = wait.operands[0].op
        assert isinstance(start, Collective), "a future is the result of a collective"
        return self.exchanges.get((start, self._members(rank, start)[0].number))

    def _issue(self, rank: _Rank, op: Collective) -> None:
        members = self._members(rank, op)
        mine = rank.issued.setdefault(op.group, [])
        for other in members:
            theirs = other.issued.get(op.group, [])
            if len(theirs) > len(mine) and theirs[len(mine)] is not op:
                raise self._fault(
                    rank.number, op, self._mismatch(rank, op, other, theirs[len(mine)]), _ONE_STREAM, True
                )
        mine.append(op)
        rank.memory.read(op, op.x)  # it must be there when the collective is issued, and then until it is complete
        for wait in op.result.users:
            rank.memory.claim(op, wait.result)
        key = (op, members[0].number)
        if key not in self.exchanges:
            self.exchanges[key] = _Exchange(op, members)
            self.in_flight.append(self.exchanges[key])
        self.exchanges[key].issuers.append(rank)

    def _combine(self, c: _Exchange) -> None:
        c.made = exchange(c.op, c.members[0].ctx, [rank.memory.read(c.op, c.op.x) for rank in c.members])
        for rank, made in zip(c.members, c.made, strict=True):
            check_shape(c.op, c.op.result, made, rank.ctx)

    def _deliver(self, c: _Exchange, place: int) -> None:
        assert c.made is not None
        rank = c.members[place]
        for wait in c.op.result.users:
            rank.memory.write(c.op, wait.result, rank.ctx.store(c.made[place], wait.result.type))
        c.complete.add(rank.number)
        if len(c.complete) == len(c.members):
            self.in_flight.remove(c)
        rank.memory.finish(c.op)

    # What errors say.

    def _mismatch(self, rank: _Rank, op: Collective, other: _Rank, pair: Collective) -> str:
        mine, theirs = self.layout.names.of(op.result), self.layout.names.of(pair.result)
        number = len(rank.issued[op.group]) + 1
        return (
            f"ranks issue the collectives of @{op.group} in different orders: number {number} is "
            f"{mine} (stream {op.stream}) on rank {rank.number}, {theirs} (stream {pair.stream}) on rank {other.number}"
        )

    def _why(self, rank: _Rank, op: Op) -> str:
        source = op.operands[0]
        name = self.layout.names.of(source)
        if op.name == "sched.wait":
            maker = source.op
            return f"sched.wait for {name}, whose record on stream {maker.stream if maker else 0} has not run"
        c = self._waited_for(rank, op)
        assert isinstance(source.op, Collective)
        missing = [r.number for r in self._members(rank, source.op) if c is None or r not in c.issuers]
        return f"comm.wait for {name}, which ranks {missing} have not started"

    def _fault(self, rank: int, op: Op, text: str, help: str, everyone: bool = False) -> IrError:
        """`op` among its neighbours, its origin and lineage, and the steps of the rank (or all) that led to it."""
        error = blame(op, f"{text} (rank {rank}, seed {self.seed})", help)
        lines = [error.where, "  the last steps of this order:"]
        for s in [s for s in self.steps if everyone or s.rank == rank or s.rank == ALL][-SHOWN:]:
            where = (
                f"rank {s.rank} stream {s.op.stream}"
                if not s.what
                else f"rank {s.rank} in flight"
                if s.rank != ALL
                else "all in flight"
            )
            lines.append(f"    {where:<16} {print_op(s.op, self.layout.names)}" + (f"  ({s.what})" if s.what else ""))
        return IrError(error.message, where="\n".join(lines), help=help, op=op)
