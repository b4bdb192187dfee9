"""Telling clients what came of a step, during the next one. Owns the thread that does it; must not know what it tells.

Between two steps everybody waits: the cores, and all requests for the slowest to be told. So what a step leaves to be
told (text to decode, callbacks to call) is handed over when the next step is planned, and is done during that step, in
which the engine's thread does not hold the interpreter's lock.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence

Telling = Callable[[], None]


class Teller:
    """Calls what it is given, in order: on its own thread from `start` on, on the caller's before. Whoever gives waits
    until what was given before is done, so that nothing piles up for listeners that are slower than steps."""

    def __init__(self, name: str) -> None:
        self._queue: queue.SimpleQueue[Sequence[Telling]] = queue.SimpleQueue()
        self._free = threading.Semaphore()
        self._started = False
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._started = True
        self.thread.start()

    def tell(self, tellings: Sequence[Telling]) -> None:
        """`tellings`, at least one, raise nothing."""
        if not self._started:
            for telling in tellings:
                telling()
            return
        self._free.acquire()
        self._queue.put(tellings)

    def end(self) -> None:
        """Nothing more comes; the thread ends after what was given."""
        self._queue.put(())

    def _run(self) -> None:
        while tellings := self._queue.get():
            for telling in tellings:
                telling()
            self._free.release()
