"""The invariants of stage buf. Owns the proof that no live buffer is overwritten.

It computes lifetimes with its own eyes instead of asking the analysis that the planner used: a shared mistake would not
show. A tensor value lives in one of four places: arguments in the caller's input buffers, weight expressions (made of
params and constants only) in the packed weights, returned values in the caller's output buffers, others in the arena.

V13  An op has one offset in `at` per tensor result that lives in the arena, in result order, and none otherwise. A view
     op may do without one: its result is then its operand's bytes; with its operand's offset it shares the buffer too.
V14  Offsets are provably >= 0, and offset + size provably <= the function's arena.
V15  Two buffers that may be in use at the same time are provably disjoint. A buffer is in use from the op that writes
     it to the last op that reads it or a view of it, both included: no op writes over what it reads. A collective in
     flight, from its start to its comm.wait, reads its operand and writes the result of the comm.wait. With several
     streams, two buffers may share bytes only where all uses of the one happen before the first use of the other.
"""

from __future__ import annotations

from dataclasses import dataclass

from xllm_compiler.dims import Dim, as_dim
from xllm_compiler.ir.core import Func, Op, Value
from xllm_compiler.ir.diag import IrError, blame
from xllm_compiler.ir.groups import rank_symbols
from xllm_compiler.ir.spec import dims_in
from xllm_compiler.ir.types import Future, Tensor


@dataclass(frozen=True, slots=True)
class Order:
    """What is done before an op begins, as bits: 1 << i stands for the op at position i. Made by verify_sched."""

    index: dict[Op, int]
    before: dict[Op, int]
    known: int  # the ops that compute weight expressions: before everything

    def done(self, first: Op, second: Op) -> bool:
        """Whether `first` is done when `second` begins, in every legal execution. Of a start: that it is issued."""
        return bool((self.before[second] | self.known) >> self.index[first] & 1)


@dataclass(slots=True)
class _Buffer:
    """`start` and `end` are positions in the list, `uses` the ops there and between, as bits."""

    value: Value
    op: Op
    offset: Dim
    size: Dim
    start: int
    end: int
    uses: int = 0


def arena_results(op: Op, weights: set[Value]) -> list[Value]:
    """The results of `op` that need a place in the arena, given the function's weight expressions."""
    returned = op.func.ret
    out = []
    for r in op.results:
        if isinstance(r.type, Tensor) and r not in weights and not any(u is returned for u, _ in r.uses):
            out.append(r)
    return out


def weight_values(func: Func) -> set[Value]:
    """Values made of params, constants, fixed-size counting and a rank's place only."""
    ranks = set(rank_symbols(func.module.groups))
    weights: set[Value] = set()
    for op in func.ops:
        if not op.SPEC.pure or any(v not in weights for v in op.operands):
            continue
        dims = [d for r in op.results if isinstance(r.type, Tensor) for d in r.type.shape]
        dims += dims_in(op.attrs.values())
        if all(ranks.issuperset(d.symbols) for d in dims):
            weights.update(op.results)
    return weights


def check_buffers(func: Func, order: Order | None = None) -> None:
    """V13 to V15 of one function; raises IrError. `order`: where several streams run it."""
    buffers = _collect(func)
    if func.arena is None:
        if buffers:
            raise blame(buffers[0].op, f"V14: @{func.name} has buffers but no arena size")
        return
    scope = func.module.scope
    zero = as_dim(0)
    for b in buffers:
        if scope.prove_le(zero, b.offset) is not True:
            raise blame(b.op, f"V14: offset {b.offset} of %{b.value.name} is not provably >= 0")
        if scope.prove_le(b.offset + b.size, func.arena) is not True:
            text = f"V14: %{b.value.name} ends at {b.offset + b.size}, not provably inside the arena of {func.arena}"
            raise blame(b.op, text)
    proved: set[tuple[Dim, Dim, Dim, Dim]] = set()
    live: list[_Buffer] = []
    ops = list(func.ops)
    settled = _settled(ops, order) if order is not None else []
    for b in buffers:  # in order of start
        if order is None:
            live = [o for o in live if o.end >= b.start]
            before = 0
        else:
            live = [o for o in live if o.uses & ~settled[b.start]]
            before = order.before[ops[b.start]]
        for o in live:
            if order is not None and not o.uses & ~before:
                continue
            key = (o.offset, o.size, b.offset, b.size)
            if key in proved:
                continue
            after = scope.prove_le(o.offset + o.size, b.offset) is True
            if not after and scope.prove_le(b.offset + b.size, o.offset) is not True:
                text = (
                    f"V15: %{b.value.name} at [{b.offset}, +{b.size}) is not provably clear of %{o.value.name} "
                    f"at [{o.offset}, +{o.size}), which "
                )
                if order is None:
                    raise blame(b.op, text + "is still in use")
                open_ = o.uses & ~before
                user = ops[open_.bit_length() - 1] if open_ >> len(ops) == 0 else func.ret
                text += f"{user.name} on stream {user.stream} may still be using"
                raise blame(b.op, text, "give one of them another offset, or order these ops with an event")
            proved.add(key)
        live.append(b)


def _settled(ops: list[Op], order: Order) -> list[int]:
    """For each position the ops that are done before anything from there on begins, on any stream."""
    out = [0] * len(ops)
    first: dict[int, int] = {}
    for i in range(len(ops) - 1, -1, -1):
        if not order.known >> i & 1:
            first[ops[i].stream] = order.before[ops[i]]
        done = -1
        for mask in first.values():
            done &= mask
        out[i] = done
    return out


def _collect(func: Func) -> list[_Buffer]:
    """All buffers in order of their first use, lifetimes extended over their views and collectives. Checks V13."""
    weights = weight_values(func)
    position = {op: i for i, op in enumerate(func.ops)}
    end_of_func = len(position)
    home: dict[Value, _Buffer] = {}
    buffers: list[_Buffer] = []
    for op, i in position.items():
        needing = arena_results(op, weights)
        at = op.attrs.get("at")
        offsets = list(at) if isinstance(at, tuple) else []
        base = home.get(op.operands[0]) if op.SPEC.view and op.operands else None
        if op.SPEC.view and needing and not offsets:
            # Without an offset it is its operand's bytes, wherever those are.
            if base is not None:
                home[needing[0]] = base
            continue
        if len(offsets) != len(needing):
            raise blame(
                op,
                f"V13: {op.name} has {len(offsets)} offsets for {len(needing)} results in the arena",
                "one entry of `at` per tensor result that is neither returned nor a weight expression",
            )
        for r, offset in zip(needing, offsets, strict=True):
            if not isinstance(offset, Dim):
                raise IrError(f"V13: offset {offset!r} of %{r.name} is not a Dim", op=op)
            if base is not None and offset is base.offset:
                home[r] = base
                continue
            buffer = _Buffer(r, op, offset, r.tensor.nbytes, i, i, 1 << i)
            if op.name == "comm.wait" and op.operands[0].op is not None:
                # The collective writes it while in flight.
                buffer.start = position[op.operands[0].op]
                buffer.uses |= 1 << buffer.start
            home[r] = buffer
            buffers.append(buffer)
    for v, buffer in home.items():
        for user, _ in v.uses:
            last = position.get(user, end_of_func)
            buffer.uses |= 1 << last
            for promised in user.results:
                if isinstance(promised.type, Future) and promised.uses:
                    last = position[promised.uses[0][0]]
                    buffer.uses |= 1 << last
            buffer.end = max(buffer.end, last)
    return sorted(buffers, key=lambda b: b.start)
