"""Delivers the outputs of a step to clients while the next step runs.

Between two steps the cores are idle and every request waits. So a thread of its own decodes text and calls callbacks,
during the next step. The engine's thread does not hold the interpreter's lock then.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence

Delivery = Callable[[], None]


class OutputDispatcher:
    """Calls deliveries in order: on its own thread once started, on the caller's before that.

    `dispatch` waits until the batch before is done, so deliveries never pile up behind slow listeners.
    """

    def __init__(self, name: str) -> None:
        self._queue: queue.SimpleQueue[Sequence[Delivery]] = queue.SimpleQueue()
        self._free = threading.Semaphore()
        self._started = False
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._started = True
        self.thread.start()

    def dispatch(self, deliveries: Sequence[Delivery]) -> None:
        """At least one delivery; none may raise."""
        if not self._started:
            for delivery in deliveries:
                delivery()
            return
        self._free.acquire()
        self._queue.put(deliveries)

    def end(self) -> None:
        """End the thread after what was dispatched."""
        self._queue.put(())

    def _run(self) -> None:
        while deliveries := self._queue.get():
            for delivery in deliveries:
                delivery()
            self._free.release()
