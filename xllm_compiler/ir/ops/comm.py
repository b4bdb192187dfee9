"""Collectives: a start that yields a future, and the wait for it. Owns their rules; who runs with whom is groups.py's.

A `Collective` says what each rank of one group gets. Everything else treats all of them alike, by that class.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Literal

import numpy as np

from xllm_compiler.dims import Dim
from xllm_compiler.ir.core import Op
from xllm_compiler.ir.cost import Cost, CostContext
from xllm_compiler.ir.diag import IrError
from xllm_compiler.ir.facts import Noise, Work
from xllm_compiler.ir.groups import RankGroup
from xllm_compiler.ir.opdef import Group, Operand, op
from xllm_compiler.ir.rows import Along, SameAxes
from xllm_compiler.ir.semantics import Array, EvalContext
from xllm_compiler.ir.shapes import axis_of, explain_dims, same_dim
from xllm_compiler.ir.types import Future, Tensor, Type

Reduction = Literal["sum", "max"]


class Collective(Op, ABC):
    """Starts an exchange of x among the ranks of `group`; yields the promise of what this rank gets from it.

    A subclass has `promised` (the type of that), `ranks` (its meaning) and `traffic`. One whose `kind` is "sum"
    completes a partial sum over its group; any other takes no partial sum.
    """

    work = Work.LIGHT
    x: Operand
    group: Group

    def infer(self) -> tuple[Type, ...]:
        x = self.x.tensor
        group = self.func.module.groups.get(self.group)
        if group is None:
            raise IrError(
                f"{self.name} over @{self.group}, which the module does not declare",
                help=f"`group @{self.group} size=..` before the functions",
            )
        kind = self.attrs.get("kind", "")
        if x.partial is not None and (x.partial != self.group or kind != "sum"):
            what = f"{self.name}, kind={kind}," if kind else self.name
            raise IrError(f"{x} is completed by a sum over @{x.partial}, not by {what} over @{self.group}")
        if kind and x.dtype == "bool":
            raise IrError(f"{self.name} is arithmetic, %{self.x.name} is bool", help="insert t.cast")
        return (Future(self.promised(Tensor(x.dtype, x.shape), group)),)

    @abstractmethod
    def promised(self, x: Tensor, group: RankGroup) -> Tensor:
        """What a rank gets, where each brings a tensor of type `x`; may put attributes into canonical form."""

    def traffic(self, ranks: int, nbytes: Dim) -> tuple[Dim, int]:
        """Bytes that one rank sends, and in how many hops, where each brings `nbytes`.

        Rings of `ranks` - 1 hops: in each of them a rank sends a share of x to scatter sums or to exchange shares, and
        all of x to gather.
        """
        return (ranks - 1) * nbytes // ranks, ranks - 1

    def cost(self, ctx: CostContext) -> Cost:
        """What one rank sends. A reduction adds up the shares of all others."""
        x, ranks = self.x.tensor, self.func.module.groups[self.group].size
        flops = (ranks - 1) * x.elements // ranks if "kind" in self.attrs else 0
        comm, hops = self.traffic(ranks, x.nbytes)
        return replace(ctx.count(self, flops), written=self.result.future.of.nbytes, comm=comm, hops=hops)

    @abstractmethod
    def ranks(self, ctx: EvalContext, xs: list[Array]) -> list[Array]:
        """What each rank of a group gets, where `xs` is what each brings: of equal shapes, in the order of the group.
        Not yet rounded to the result type."""

    def interp(self, ctx: EvalContext, x: Array) -> Array:
        """On a group of one rank; run_ranks asks `ranks`."""
        (y,) = self.ranks(ctx, [x])
        return y

    def default_hint(self, index: int) -> str:
        return "f"


@op("comm.all_reduce_start", effects=("comm",))
class AllReduceStart(Collective):
    """f = the promise of x combined over all ranks of `group`, in rank order; a partial sum is whole again."""

    rows = SameAxes()
    noise = Noise.ROUNDS
    kind: Reduction = "sum"

    def promised(self, x: Tensor, group: RankGroup) -> Tensor:
        return x

    def traffic(self, ranks: int, nbytes: Dim) -> tuple[Dim, int]:
        """Sums are scattered, then gathered (Patarasuk and Yuan, JPDC 69(2), 2009)."""
        return 2 * (ranks - 1) * nbytes // ranks, 2 * (ranks - 1)

    def ranks(self, ctx: EvalContext, xs: list[Array]) -> list[Array]:
        return [_combined(ctx, self.kind, xs)] * len(xs)


@op("comm.all_gather_start", effects=("comm",))
class AllGatherStart(Collective):
    """f = the promise of all ranks' x, one after the other along `axis`, in rank order."""

    rows = Along()
    noise = Noise.MOVES
    axis: int

    def promised(self, x: Tensor, group: RankGroup) -> Tensor:
        axis = self.attrs["axis"] = axis_of(self.axis, x.rank)
        return _with_axis(x, axis, x.shape[axis] * group.size)

    def traffic(self, ranks: int, nbytes: Dim) -> tuple[Dim, int]:
        return (ranks - 1) * nbytes, ranks - 1

    def ranks(self, ctx: EvalContext, xs: list[Array]) -> list[Array]:
        return [np.concatenate(xs, axis=self.axis)] * len(xs)


@op("comm.reduce_scatter_start", effects=("comm",))
class ReduceScatterStart(Collective):
    """f = the promise of one share of x combined over `group` as by all_reduce: `axis` is cut into as many equal shares
    as there are ranks, and each gets the one of its place."""

    rows = Along()
    noise = Noise.ROUNDS
    axis: int
    kind: Reduction = "sum"

    def promised(self, x: Tensor, group: RankGroup) -> Tensor:
        axis = self.attrs["axis"] = axis_of(self.axis, x.rank)
        return _with_axis(x, axis, _share(self, x, axis, group))

    def ranks(self, ctx: EvalContext, xs: list[Array]) -> list[Array]:
        return np.split(_combined(ctx, self.kind, xs), len(xs), axis=self.axis)


@op("comm.all_to_all_start", effects=("comm",))
class AllToAllStart(Collective):
    """f = the promise of the shares that are meant for this rank, one after the other along `concat`, in rank order.

    Every rank cuts its x along `split` into as many equal shares as there are ranks; the i-th is for the i-th rank.
    """

    rows = Along(("split", "concat"))
    noise = Noise.MOVES
    split: int
    concat: int

    def promised(self, x: Tensor, group: RankGroup) -> Tensor:
        split = self.attrs["split"] = axis_of(self.split, x.rank)
        concat = self.attrs["concat"] = axis_of(self.concat, x.rank)
        share = _with_axis(x, split, _share(self, x, split, group))
        return x if split == concat else _with_axis(share, concat, x.shape[concat] * group.size)

    def ranks(self, ctx: EvalContext, xs: list[Array]) -> list[Array]:
        shares = [np.split(x, len(xs), axis=self.split) for x in xs]
        return [np.concatenate([s[i] for s in shares], axis=self.concat) for i in range(len(xs))]


@op("comm.broadcast_start", effects=("comm",))
class BroadcastStart(Collective):
    """f = the promise of the x of the rank whose place in the group is `root`."""

    rows = SameAxes()
    noise = Noise.MOVES
    root: int = 0

    def promised(self, x: Tensor, group: RankGroup) -> Tensor:
        if not 0 <= self.root < group.size:
            raise IrError(f"{self.name} from place {self.root} of @{self.group}, which has {group.size} ranks")
        return x

    def traffic(self, ranks: int, nbytes: Dim) -> tuple[Dim, int]:
        """A binomial tree, whose root sends x in each of ceil(log2 ranks) hops."""
        hops = (ranks - 1).bit_length()
        return hops * nbytes, hops

    def ranks(self, ctx: EvalContext, xs: list[Array]) -> list[Array]:
        return [xs[self.root]] * len(xs)


@op("comm.wait", effects=("comm",))
class Wait(Op):
    """y = what the future f promised."""

    rows = SameAxes()
    noise = Noise.MOVES
    work = Work.NONE
    f: Operand

    def infer(self) -> tuple[Type, ...]:
        return (self.f.future.of,)

    def interp(self, ctx: EvalContext, f: Array) -> Array:
        return f


def _combined(ctx: EvalContext, kind: str, xs: list[Array]) -> Array:
    """Sum or maximum over the ranks, first to last."""
    total = ctx.up(xs[0])
    for x in xs[1:]:
        total = np.add(total, ctx.up(x)) if kind == "sum" else np.maximum(total, ctx.up(x))
    return total


def _with_axis(x: Tensor, axis: int, size: Dim) -> Tensor:
    return x.with_(shape=[size if i == axis else d for i, d in enumerate(x.shape)])


def _share(op: Collective, x: Tensor, axis: int, group: RankGroup) -> Dim:
    """The size of one of the equal shares of an axis; IrError unless it is proved to divide."""
    whole = x.shape[axis]
    share = whole // group.size
    if not same_dim(op.scope, share * group.size, whole):
        raise IrError(
            f"{op.name} cuts axis {axis} of {x} into {group.size} shares, one for each rank of @{op.group}: "
            f"{whole} is not provably a multiple of {group.size}",
            help=explain_dims(op.scope, whole) or "pad the axis, or choose another one",
        )
    return share
