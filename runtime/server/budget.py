"""How many bytes of requests may be in memory at once, over all connections, and who makes room.

A limit per request says nothing about a thousand of them. What counts has arrived and is not finished: incomplete
heads, bodies until their handler is done with them, and requests that wait behind another one on their connection. Only
the event loop's thread may use it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable


class Budget:
    """`limit` in bytes. Beyond it, the request that has been arriving longest is ended: a slow client, not a
    quick one.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self.peak = 0
        self.given_up = 0  # requests that made room
        self._arriving: OrderedDict[Hold, None] = OrderedDict()

    def hold(self, give_up: Callable[[], None]) -> Hold:
        """A share of the budget, empty at first. `give_up` must not raise; it ends the request that holds the share."""
        return Hold(self, give_up)

    def _make_room(self) -> None:
        while self.used > self.limit and self._arriving:
            victim = next(iter(self._arriving))
            self.given_up += 1
            victim.release()
            victim.gone = True
            victim.give_up()


class Hold:
    """One request's share of a budget."""

    def __init__(self, budget: Budget, give_up: Callable[[], None]) -> None:
        self.budget = budget
        self.give_up = give_up
        self.size = 0
        self.gone = False  # it had to make room; nothing counts any more
        self._complete = False

    def set(self, size: int) -> None:
        """Count `size` bytes from now on. This request, or others, may have to give up for it."""
        if self.gone or size == self.size:
            return
        budget = self.budget
        budget.used += size - self.size
        self.size = size
        if not size:
            budget._arriving.pop(self, None)
        elif not self._complete:
            budget._arriving.setdefault(self)
        if budget.used > budget.limit:
            budget._make_room()
        budget.peak = max(budget.peak, budget.used)

    def add(self, size: int) -> None:
        self.set(self.size + size)

    def complete(self) -> None:
        """The whole request has arrived; from now on it is not asked to make room."""
        self._complete = True
        self.budget._arriving.pop(self, None)

    def release(self) -> None:
        """Count nothing any more."""
        self.budget.used -= self.size
        self.size = 0
        self.budget._arriving.pop(self, None)
