"""plan-memory: gives every value that lives in a step an offset in the arena, and the arena its size.

A value is placed by formulas, not numbers: offsets are Dims over the step's symbols, so one plan serves every step size
and the arena is never sized by trial. See `plan` for the method.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from xllm_compiler.analysis.happens_before import Clock, HappensBefore, begun, done, passed
from xllm_compiler.analysis.liveness import LiveRange, view_base, views_of
from xllm_compiler.dims import Dim, DimScope, as_dim, ceildiv, dmax
from xllm_compiler.errors import XllmError
from xllm_compiler.ir.core import Func, Module, Op, Stage, Value
from xllm_compiler.ir.types import Tensor
from xllm_compiler.passes.base import Pass, PassContext
from xllm_compiler.passes.registry import register_pass


@register_pass("plan-memory")
@dataclass(frozen=True)
class PlanMemory(Pass):
    """Assigns arena offsets so that values that may be in use at the same time provably do not overlap, at any size.

    before:  func @f(%x: f32[N, 8]) -> (f32[N, 8]) {
               %a = t.exp(%x) : f32[N, 8]
               %b = t.neg(%a) : f32[N, 8]
               %c = t.abs(%b) : f32[N, 8]
               %d = t.exp(%c) : f32[N, 8]
    after:   func @f(%x: f32[N, 8]) -> (f32[N, 8]) arena(128*ceildiv(N, 2)) {
               %a = t.exp(%x, at=[0]) : f32[N, 8]
               %b = t.neg(%a, at=[64*ceildiv(N, 2)]) : f32[N, 8]
               %c = t.abs(%b, at=[0]) : f32[N, 8]
               %d = t.exp(%c) : f32[N, 8]

    Needs no place: arguments, weight expressions, kv values, and what the function returns (the caller's buffers).
    A view has its operand's place. No op writes where it reads, nor over what a collective in flight reads or writes.
    With several streams a place is taken again only by what happens after all uses of its last owner, whatever the list
    order says. The module is in stage buf afterwards.
    """

    needs: ClassVar[Stage] = "sched"
    leaves: ClassVar[Stage] = "buf"

    def run(self, module: Module, ctx: PassContext) -> bool:
        for func in module.funcs.values():
            order = HappensBefore(func)
            buffers = collect(func, order, ctx.target.align)
            placed = plan(buffers, neighbours(buffers, order), module.scope)
            ctx.stat("buffers", len(buffers))
            ctx.stat("arena-bytes", _at_maxima(module.scope, write_back(func, placed)))
            ctx.stat("live-bytes", _peak(buffers))
        module.stage = "buf"
        return True


@dataclass(frozen=True, slots=True)
class Buffer:
    """Bytes for `value` and its views: `bytes`, rounded up to `size`; at most `largest`.

    `first` is the first op that uses them and `reach` the point where all are done; `range`, the same in the list.
    """

    value: Value
    bytes: Dim
    size: Dim
    largest: int
    first: Op
    reach: Clock
    range: LiveRange
    offset: Dim | None = None

    @property
    def start(self) -> Dim:
        assert self.offset is not None, "not placed yet"
        return self.offset

    @property
    def end(self) -> Dim:
        """Where the next aligned buffer may start."""
        return self.start + self.size

    @property
    def last(self) -> Dim:
        """Where its bytes end."""
        return self.start + self.bytes


def collect(func: Func, order: HappensBefore, align: int) -> list[Buffer]:
    """The values of `func` that need a place, in order of definition."""
    scope = func.module.scope
    position = {op: i for i, op in enumerate((*func.ops, func.ret))}
    out: list[Buffer] = []
    for op in func.ops:
        for r in op.results:
            if not isinstance(r.type, Tensor) or r in order.weights or view_base(r) is not r or func.ret in r.users:
                continue
            size = align * ceildiv(r.type.nbytes, align)
            first = begun(op)  # of a comm.wait: a collective in flight writes its result
            uses = [op, *(done(user) for v in (r, *views_of(r)) for user in v.users)]
            span = LiveRange(position[first], max(position[use] for use in uses))
            out.append(Buffer(r, r.type.nbytes, size, _at_maxima(scope, size), first, order.reach(uses), span))
    return out


def neighbours(buffers: list[Buffer], order: HappensBefore) -> list[list[int]]:
    """For each buffer, the others that may be in use while it is: neither is done before the other is first used."""
    near: list[list[int]] = [[] for _ in buffers]
    settled = order.settled()
    live: list[int] = []
    for i in sorted(range(len(buffers)), key=lambda i: buffers[i].range.start):
        first = buffers[i].first
        live = [j for j in live if not passed(settled[first], buffers[j].reach)]
        for j in live:
            if not passed(order.clock(first), buffers[j].reach):
                near[i].append(j)
                near[j].append(i)
        live.append(i)
    return near


def plan(buffers: list[Buffer], near: list[list[int]], scope: DimScope) -> list[Buffer]:
    """The buffers with offsets. `near[i]`: the buffers that may be in use while the i-th is.

    Greedy best fit over symbolic sizes. Buffers are placed largest first and, as a second attempt, in order of
    definition; the smaller arena at the dims' maxima wins. Each may start at 0, at the end of a buffer that is in use
    at the same time, or past all of those; of the places where it is proved clear of every such buffer it takes the one
    that ends lowest at the maxima. What cannot be proved disjoint is taken to overlap.
    """
    by_size = sorted(range(len(buffers)), key=lambda i: (-buffers[i].largest, buffers[i].range.start, i))
    proofs: dict[tuple[Dim, Dim], bool] = {}

    def fits_below(end: Dim, start: Dim) -> bool:
        key = (end, start)
        if key not in proofs:
            proofs[key] = end is start or scope.prove_le(end, start) is True
        return proofs[key]

    best: list[Buffer] = []
    best_size = -1
    for order in (by_size, list(range(len(buffers)))):
        placed: dict[int, Buffer] = {}
        for i in order:
            b = buffers[i]
            taken = [placed[j] for j in near[i] if j in placed]
            ends = list(dict.fromkeys(p.end for p in taken))
            candidates = list(dict.fromkeys([as_dim(0), *ends, highest(taken, scope)]))
            candidates.sort(key=lambda d: (_at_maxima(scope, d), len(d.terms), str(d)))
            candidates.append(sum(ends, start=as_dim(0)))  # wasteful, and provable where a maximum is too deep a one
            for offset in candidates:
                last = offset + b.bytes
                if all(fits_below(p.last, offset) or fits_below(last, p.start) for p in taken):
                    placed[i] = replace(b, offset=offset)
                    break
            else:
                raise XllmError("internal", f"no provable place in the arena for %{b.value.name}", where=b.value.name)
        size = max((_at_maxima(scope, p.end) for p in placed.values()), default=0)
        if best_size < 0 or size < best_size:
            best, best_size = [placed[i] for i in range(len(buffers))], size
    return best


def write_back(func: Func, placed: list[Buffer]) -> Dim:
    """Sets `at` on every op with results in the arena, and the arena's size, which it returns."""
    offsets = {b.value: b.start for b in placed}
    for op in func.ops:
        at = []
        for r in op.results:
            base = view_base(r)
            if base in offsets and (base is r or func.ret not in r.users):
                at.append(offsets[base])
        if at:
            op.set_attr("at", tuple(at))
    scope = func.module.scope
    func.arena = highest(placed, scope)
    for b in placed:  # one end under another under the maximum: three facts that the prover need not put together
        if scope.prove_le(b.last, func.arena) is not True:
            larger = dmax(func.arena, b.end)
            func.arena = larger if scope.prove_le(b.last, larger) is True else func.arena + b.end
    return func.arena


def highest(buffers: list[Buffer], scope: DimScope) -> Dim:
    """The maximum of the buffers' ends (0 of none), without ends under which another buffer's bytes provably lie.

    Questions are asked about bytes and not about aligned sizes, here as in `plan`: they are the ones that the verifier
    will ask, and what is proved now is proved then.
    """
    kept: list[Dim] = []
    seen: set[tuple[Dim, Dim]] = set()
    for b in sorted(buffers, key=lambda b: (-_at_maxima(scope, b.end), str(b.end))):
        if (b.start, b.bytes) not in seen and not any(scope.prove_le(b.last, end) is True for end in kept):
            kept.append(b.end)
        seen.add((b.start, b.bytes))
    return dmax(*kept) if kept else as_dim(0)


def _at_maxima(scope: DimScope, size: Dim) -> int:
    """An upper bound of `size`; every symbol of a step has one."""
    hi = scope.prover.interval(size)[1]
    if hi is None:
        unbounded = [s for s in size.symbols if s not in scope.symbols or scope.symbols[s].hi is None]
        text = f"size {size} has no bound: {', '.join(unbounded)} may grow without limit"
        raise XllmError("unsupported", text, help="declare an upper end: dim N in [1, 4096]")
    return hi


def _peak(buffers: list[Buffer]) -> int:
    """The most bytes in use at once, at the maxima: no plan can need less there."""
    change: dict[int, int] = {}
    for b in buffers:
        change[b.range.start] = change.get(b.range.start, 0) + b.largest
        change[b.range.end + 1] = change.get(b.range.end + 1, 0) - b.largest
    total = peak = 0
    for at in sorted(change):
        total += change[at]
        peak = max(peak, total)
    return peak
