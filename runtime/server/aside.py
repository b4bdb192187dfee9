"""Runs long work on one thread of low priority, so that the event loop goes on. What may wait for it is bounded.

Only for calls that release the interpreter's lock; others would block the loop from there as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from xllm_compiler.runtime.server.errors import unavailable

T = TypeVar("T")
_NICE = 10


class Aside:
    """One thread and its queue. The event loop's thread only."""

    def __init__(self, most_waiting: int) -> None:
        """`most_waiting`: bytes of the work that runs and waits. More is refused, except a single larger piece."""
        self.most_waiting = most_waiting
        self.waiting = 0
        self._pool = ThreadPoolExecutor(1, "xllm-aside", _be_nice)

    async def run(self, size: int, work: Callable[[], T]) -> T:
        """What `work` returns; `size` is what it holds in bytes. Raises ApiError 429 when too much waits."""
        if self.waiting and self.waiting + size > self.most_waiting:
            raise unavailable("too much text waits to be tokenized", code="server_overloaded", status=429)
        self.waiting += size
        future = asyncio.get_running_loop().run_in_executor(self._pool, work)
        future.add_done_callback(lambda _: self._done(size))
        return await future

    def _done(self, size: int) -> None:
        self.waiting -= size


def _be_nice() -> None:
    with contextlib.suppress(OSError):  # a sandbox may forbid it; the work is as well done at the usual priority
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
