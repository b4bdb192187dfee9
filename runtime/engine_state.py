"""What the engine's thread and the others share. Owns the lock, and who may still be told what."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from xllm_compiler.errors import XllmError
from xllm_compiler.runtime.base_sequence import BaseSequence
from xllm_compiler.runtime.request import OnOutput, Request

Message = tuple[Request, OnOutput] | tuple[BaseSequence, XllmError] | str
"""A new request, a sequence that is to end with an error, or the id of a request to abort."""


class EngineState:
    """One per engine. Any thread may append to `inbox` and set `wake`; `lock` guards the rest of what is written."""

    def __init__(self, before_first_output: Callable[[], None] | None) -> None:
        self.inbox: deque[Message] = deque()
        self.wake = threading.Event()
        self.idle = threading.Condition()
        self.lock = threading.Lock()
        self.computing = threading.Lock()  # held while a step runs
        self.before_first_output = before_first_output
        self.ids: set[str] = set()
        self.accepting = True
        self.stopping = False
        self.fatal: XllmError | None = None
        self.progress = time.monotonic()

    def send(self, message: Message) -> None:
        """Have the engine's thread do something before its next step."""
        self.inbox.append(message)
        self.wake.set()

    def check_alive(self) -> None:
        """Raises what `fail` was told."""
        if self.fatal is not None:
            raise self.fatal

    def forget(self, request_id: str) -> None:
        """The last event of a request was delivered."""
        with self.lock:
            self.ids.discard(request_id)
        with self.idle:
            self.idle.notify_all()

    def run_first_output_check(self) -> None:
        """Run `before_first_output`, once. What it raises ends everything."""
        check = self.before_first_output
        if check is None:
            return
        try:
            check()
        except XllmError as error:
            with self.lock:
                self.fatal = error
            raise
        with self.lock:
            if self.before_first_output is check:
                self.before_first_output = None
