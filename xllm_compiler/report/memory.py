"""The memory plan as it stands in the IR: which bytes, when. Owns reading it; deciding is plan-memory's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from xllm_compiler.analysis.happens_before import begun, done
from xllm_compiler.analysis.liveness import Liveness, LiveRange, view_base, views_of
from xllm_compiler.analysis.simulate import Slot
from xllm_compiler.analysis.weights import weight_exprs
from xllm_compiler.dims import Dim
from xllm_compiler.ir.core import Func, Op, Value
from xllm_compiler.ir.verify_buf import arena_results


@dataclass(frozen=True, slots=True)
class Placed:
    """A buffer in the arena: `bytes` at `offset`, in use by ops `range.start` to `range.end`, which are `users`."""

    value: Value
    offset: Dim
    bytes: Dim
    range: LiveRange
    users: tuple[Op, ...]


def placed_buffers(func: Func) -> list[Placed]:
    """Every buffer of a planned function, in order of definition; none where nothing is planned."""
    weights = weight_exprs(func)
    known = set(weights)
    live = Liveness(func)
    found: list[Placed] = []
    for op in func.ops:
        at = op.attrs.get("at")
        if not isinstance(at, tuple):
            continue
        for r, offset in zip(arena_results(op, known), at, strict=True):
            assert isinstance(offset, Dim)
            if view_base(r) is not r:
                continue
            # A collective in flight reads its operand, and writes the result of its comm.wait.
            users: dict[Op, None] = {begun(op): None, op: None}
            for value in (r, *views_of(r)):
                for user in value.users:
                    users.update({user: None, done(user): None})
            span = LiveRange(live.position[begun(op)], max(live.position.get(u, len(live.position)) for u in users))
            found.append(Placed(r, offset, r.tensor.nbytes, span, tuple(users)))
    return found


def bytes_in_use(buffers: Sequence[Placed], slots: Sequence[Slot], dims: Mapping[str, int]) -> list[tuple[float, int]]:
    """(time, bytes in use from then on) at every change: from the start of the op that writes a buffer to the end of
    the last op that uses it."""
    times = {slot.op: slot for slot in slots}
    change: dict[float, int] = {}
    for b in buffers:
        used = [times[op] for op in b.users if op in times]
        if used and (size := b.bytes.evaluate(dict(dims))):
            begin, end = min(s.start for s in used), max(s.end for s in used)
            change[begin] = change.get(begin, 0) + size
            change[end] = change.get(end, 0) - size
    total, out = 0, []
    for at in sorted(change):
        total += change[at]
        out.append((at, total))
    return out
