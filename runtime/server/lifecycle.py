"""From listening to the last byte: signals, draining, and the watchdog for a stalled engine.

The first SIGTERM, SIGINT or SIGHUP (the terminal was closed) drains. New requests and health probes get 503, running
requests finish, and the process ends with 0. When the time is up, what still runs is aborted, and its client is told. A
second SIGTERM or SIGINT ends the process at once. SIGHUP comes twice by itself, from the shell and from the kernel.
Under nohup SIGHUP stays ignored.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import ssl
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator
from types import FrameType
from typing import Protocol

import uvicorn
from starlette.types import ASGIApp

from xllm_compiler.errors import XllmError
from xllm_compiler.runtime.server.connection_guard import ConnectionGuard
from xllm_compiler.runtime.server.context import Context
from xllm_compiler.runtime.stats import Health

log = logging.getLogger("xllm.server")

STALL_SECONDS = 120.0  # without a finished step while requests wait; a step of a large prefill takes seconds
_FLUSH_SECONDS = 5  # for last events to reach their clients after an abort


class HasHealth(Protocol):
    def health(self) -> Health: ...


def health_check(engine: HasHealth, stall_seconds: float = STALL_SECONDS) -> Callable[[], str | None]:
    """A function that says why the engine is unhealthy, or None: tokens must move, an open port is no sign of life."""

    def check() -> str | None:
        state = engine.health()
        if state.error is not None:
            return f"the engine has failed: {state.error.message}"
        if not state.alive:
            return "the engine's thread has ended"
        if state.stalled_s > stall_seconds:
            return f"requests are waiting, but no step has finished for {state.stalled_s:.0f} s"
        return None

    return check


def make_config(
    app: ASGIApp, guard: ConnectionGuard, *, keep_alive: int, certfile: str | None, keyfile: str | None
) -> uvicorn.Config:
    """uvicorn's configuration. Raises XllmError("option") for an unusable certificate."""
    config = uvicorn.Config(
        app,
        loop="uvloop",
        http=guard.protocol_class(),
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=keep_alive,
        timeout_graceful_shutdown=_FLUSH_SECONDS,
        ssl_certfile=certfile,
        ssl_keyfile=keyfile,
    )
    try:
        config.load()
    except (OSError, ssl.SSLError) as error:
        raise XllmError("option", f"cannot use the certificate or its key: {error}", where="--ssl-certfile") from None
    return config


class Server(uvicorn.Server):
    """uvicorn's server with our way of ending."""

    def __init__(
        self, config: uvicorn.Config, ctx: Context, drain_seconds: float, on_ready: Callable[[], None] | None = None
    ) -> None:
        super().__init__(config)
        self.ctx = ctx
        self.drain_seconds = drain_seconds
        self.on_ready = on_ready
        self._deadline: float | None = None
        self._reported = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and self.on_ready is not None:
            self.on_ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        with super().capture_signals():
            before = None
            if threading.current_thread() is threading.main_thread():
                before = signal.getsignal(signal.SIGHUP)
            if before is None or before is signal.SIG_IGN:
                yield
                return
            signal.signal(signal.SIGHUP, self.handle_exit)
            try:
                yield
            finally:
                signal.signal(signal.SIGHUP, before if self._deadline is None else signal.SIG_IGN)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: drain. Second: leave at once, with the shell's exit status for that signal."""
        if self._deadline is not None:
            if sig == signal.SIGHUP:
                return
            os._exit(128 + sig)
        self.drain(signal.Signals(sig).name)

    def drain(self, why: str) -> None:
        """Take no new requests, and stop when the running ones are done or the time is up."""
        if self._deadline is None:
            self._deadline = time.monotonic() + self.drain_seconds
            self.ctx.draining = True
            log.info("%s: draining %d running requests", why, self.ctx.engine_client.open)

    async def on_tick(self, counter: int) -> bool:
        if await super().on_tick(counter):
            return True
        if self._deadline is not None:
            if self.ctx.engine_client.open == 0:
                return True
            if time.monotonic() >= self._deadline:
                log.warning("time is up: aborting %d requests", self.ctx.engine_client.open)
                self.ctx.engine_client.end_all()
                return True
        if counter % 50 == 0:
            self._watch()
        return False

    def _watch(self) -> None:
        """Say once, with every thread's stack, that the engine has stopped moving."""
        reason = self.ctx.health()
        if reason is None:
            self._reported = False
        elif not self._reported:
            self._reported = True
            log.error("unhealthy: %s\n%s", reason, _stacks())


def _stacks() -> str:
    """What every thread is doing."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "".join(
        f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
    )
