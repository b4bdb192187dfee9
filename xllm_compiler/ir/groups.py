"""Groups of ranks that communicate: axes of one mesh. Owns who is in which group; must not know any op.

    group @tp size=2 rank=R      // ranks 0 1 | 2 3, and the dim R is a rank's place in its own: 0 or 1
    group @dp size=2 stride=2    // ranks 0 2 | 1 3
    group @ep size=4             // ranks 0 1 2 3

Every rank is in one group of each name. Ranks are numbered like the elements of an array: a group is one axis of it, or
several neighbouring ones. Beyond the mesh the pattern repeats, so a world of 8 ranks runs these groups twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from xllm_compiler.dims.scope import DimScope
from xllm_compiler.ir.diag import IrError

MAX_RANKS: Final = 1 << 20  # of a world; the largest clusters have a tenth of that


@dataclass(frozen=True, slots=True)
class RankGroup:
    """`size` ranks, `stride` apart. `rank`: the symbol that stands for a rank's place in its group, "" for none."""

    size: int
    stride: int = 1
    rank: str = ""

    def __post_init__(self) -> None:
        if self.size < 1 or self.stride < 1:
            raise IrError(f"a group of {self.size} ranks, {self.stride} apart", help="both are at least 1")

    @property
    def span(self) -> int:
        """How many ranks there are from the first of a group to the next group behind it."""
        return self.size * self.stride

    def place(self, rank: int) -> int:
        """Where a rank stands in its group: 0 .. size - 1."""
        return rank // self.stride % self.size

    def members(self, rank: int) -> tuple[int, ...]:
        """The ranks of the group that `rank` is in, in order."""
        first = rank - self.place(rank) * self.stride
        return tuple(range(first, first + self.span, self.stride))

    def __str__(self) -> str:
        text = f"size={self.size}"
        text += f" stride={self.stride}" if self.stride != 1 else ""
        return text + (f" rank={self.rank}" if self.rank else "")


Groups = Mapping[str, RankGroup]


def world_size(groups: Groups) -> int:
    """How many ranks the groups need: as many as their mesh has."""
    return max((g.span for g in groups.values()), default=1)


def check_world(groups: Groups, ranks: int) -> None:
    """IrError unless so many ranks are one mesh of the groups, or several."""
    world = world_size(groups)
    if ranks % world:
        text = ", ".join(f"@{name} {group}" for name, group in groups.items())
        raise IrError(f"the groups need {world} ranks, {ranks} are run", help=f"use run_ranks; the groups are {text}")


def rank_symbols(groups: Groups) -> dict[str, str]:
    """The symbols that stand for a rank's place, each with the name of its group."""
    return {g.rank: name for name, g in groups.items() if g.rank}


def rank_sizes(groups: Groups, rank: int) -> dict[str, int]:
    """What the rank symbols are on one rank."""
    return {g.rank: g.place(rank) for g in groups.values() if g.rank}


def check_groups(groups: Groups, scope: DimScope) -> None:
    """IrError unless all groups are axes of one mesh, and each rank symbol is a place in its group (V9, V21)."""
    # Where an axis of the mesh begins or ends, each with the group that says so.
    cuts = {1: ""}
    for name, group in groups.items():
        cuts.setdefault(group.stride, name)
        cuts.setdefault(group.span, name)
    for (low, a), (high, b) in pairwise(sorted(cuts.items())):
        if high % low:
            raise IrError(
                f"V9: groups @{a} and @{b} are no axes of one mesh: {low} ranks do not divide {high}",
                help=f"@{a} {groups[a]}, @{b} {groups[b]}: where one axis ends, another begins or ends too",
            )
    if world_size(groups) > MAX_RANKS:
        raise IrError(f"V9: the groups need {world_size(groups)} ranks", help=f"at most {MAX_RANKS}")
    owner: dict[str, str] = {}
    for name, group in groups.items():
        if not group.rank:
            continue
        if group.rank in owner:
            raise IrError(
                f"V21: {group.rank} is the rank of @{owner[group.rank]} and of @{name}", help="give each its own dim"
            )
        owner[group.rank] = name
        symbol = scope.symbols.get(group.rank)
        want = f"dim {group.rank} in [0, {group.size - 1}]"
        if symbol is None or (symbol.lo, symbol.hi, symbol.multiple) != (0, group.size - 1, 1):
            said = "is not declared" if symbol is None else f"lies in [{symbol.lo}, {symbol.hi}]"
            raise IrError(f"V21: {group.rank}, the rank of @{name}, {said}", help=f"declare `{want}`")
