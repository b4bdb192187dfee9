"""How many bytes of requests may lie in memory at once, over all connections. Owns the count and who makes room.

A limit per request says nothing about a thousand of them. Counted is what has arrived and is not dealt with: heads that
are not complete, bodies until their request's handler is done with them, and requests that wait behind another one on
their connection. The event loop's thread only.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable


class Budget:
    """`limit` in bytes. Beyond it, what has been arriving longest gives way: a client that dribbles, not one that is
    quick."""

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
        """It is `size` bytes now. This request, or others, may have to give up for it."""
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
        """All of it is here: it is being worked on and need not make room any more."""
        self._complete = True
        self.budget._arriving.pop(self, None)

    def release(self) -> None:
        """Nothing of it is in memory any more."""
        self.budget.used -= self.size
        self.size = 0
        self.budget._arriving.pop(self, None)
