"""A function's ops in order. Owns the linked list, which may change while somebody walks along it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xllm_compiler.ir.core import Op


class OpList:
    """A function's ops in order. Safe to mutate while iterating: the iterator goes on after the op it has yielded,
    wherever that op stands by then, and past erased ones; ops inserted after the current one are visited."""

    __slots__ = ("_count", "_first", "_last", "_ordered")

    def __init__(self) -> None:
        self._first: Op | None = None
        self._last: Op | None = None
        self._count = 0
        self._ordered = True

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Op]:
        op = self._first
        while op is not None:
            yield op
            op = op._next
            while op is not None and not op._attached:
                op = op._next

    def __reversed__(self) -> Iterator[Op]:
        op = self._last
        while op is not None:
            yield op
            op = op._prev
            while op is not None and not op._attached:
                op = op._prev

    def __getitem__(self, index: int) -> Op:
        """The index-th op, in linear time: for tests and tools."""
        return list(self)[index]

    @property
    def first(self) -> Op | None:
        return self._first

    @property
    def last(self) -> Op | None:
        return self._last

    def append(self, op: Op) -> None:
        assert not op._attached, f"{op!r} is already in a function"
        op._prev, op._next = self._last, None
        if self._last is None:
            self._first = op
        else:
            self._last._next = op
            op._order = self._last._order + 1
        self._last = op
        op._attached = True
        self._count += 1

    def insert_before(self, op: Op, anchor: Op) -> None:
        assert not op._attached, f"{op!r} is already in a function"
        assert anchor._attached, f"{anchor!r} is not in a function"
        op._prev, op._next = anchor._prev, anchor
        if anchor._prev is None:
            self._first = op
        else:
            anchor._prev._next = op
        anchor._prev = op
        op._attached = True
        self._count += 1
        self._ordered = False

    def unlink(self, op: Op) -> None:
        """Takes `op` out. It keeps its neighbours, so that an iterator standing on it can go on."""
        assert op._attached, f"{op!r} is not in a function"
        if op._prev is None:
            self._first = op._next
        else:
            op._prev._next = op._next
        if op._next is None:
            self._last = op._prev
        else:
            op._next._prev = op._prev
        op._attached = False
        self._count -= 1

    def order(self, op: Op) -> int:
        """A number that grows along the list; stable until the next insertion."""
        if not self._ordered:
            for i, o in enumerate(self):
                o._order = i
            self._ordered = True
        return op._order
