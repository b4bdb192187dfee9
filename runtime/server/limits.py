"""Guards of connections: how long a request may take to arrive, how large its head may be, how many there may be.

Owns the protocol class given to uvicorn, which by itself waits for ever for a first byte and takes any size of head.
Must not know about endpoints.
"""

from __future__ import annotations

import asyncio
from asyncio.events import TimerHandle
from collections import OrderedDict

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from xllm_compiler.runtime.server.errors import ApiError

MAX_HEAD_BYTES = 64 * 2**10  # request line and headers; llhttp itself sets no bound
WRITE_STALL_SECONDS = 120.0  # a client may leave an answer unread for so long


class ConnectionGuard:
    """Counts connections and remembers the idle ones, oldest first. One per server; the event loop's thread only."""

    def __init__(self, max_connections: int, receive_timeout: float) -> None:
        self.max_connections = max_connections
        self.receive_timeout = receive_timeout
        self.open = 0
        self.idle: OrderedDict[GuardedProtocol, None] = OrderedDict()
        self.timed_out = 0
        self.evicted = 0

    def protocol_class(self) -> type[GuardedProtocol]:
        """uvicorn makes protocols from a class alone, so the class carries the guard."""
        return type("BoundProtocol", (GuardedProtocol,), {"guard": self})

    def make_room(self) -> None:
        """Close the connection that has been idle longest when there are too many."""
        if self.open > self.max_connections and self.idle:
            victim, _ = self.idle.popitem(last=False)
            self.evicted += 1
            victim.transport.close()


class GuardedProtocol(HttpToolsProtocol):
    """HTTP/1.1 with a deadline for the head of every request, a bound on its size, and eviction of idle connections.

    A connection is idle from the moment it opens, or from the end of a response, until a request's head is complete.
    """

    guard: ConnectionGuard
    _head_timer: TimerHandle | None = None
    _write_timer: TimerHandle | None = None
    _head_bytes = 0
    _head_open = False
    _counted = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._counted = True
        self.guard.open += 1
        self.guard.idle[self] = None
        self._arm()
        self.guard.make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._counted:
            self._counted = False
            self.guard.open -= 1
        self.guard.idle.pop(self, None)
        self._disarm()
        self._disarm_write()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client does not read. Close on it after a while: a stalled reader would hold its request's memory."""
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(WRITE_STALL_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._disarm_write()

    def _disarm_write(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _in_request(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _arm(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.guard.receive_timeout, self._head_timeout)

    def _disarm(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_timeout(self) -> None:
        self._head_timer = None
        if self.transport.is_closing() or self._in_request():
            return
        self.guard.timed_out += 1
        if self._head_open:
            self._refuse(408, "the request's head did not arrive in time", "request_timeout")
        else:
            self.transport.close()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        was_open = self._head_open
        if not self._in_request():
            self._arm()
        super().data_received(data)
        if not (self._head_open and was_open):
            self._head_bytes = 0
            return
        self._head_bytes += len(data)
        if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            if self._in_request():  # a pipelined head: a refusal would land in the middle of the running response
                self.transport.close()
            else:
                self._refuse(431, f"the request's head is larger than {MAX_HEAD_BYTES} bytes", "head_too_large")

    def on_message_begin(self) -> None:
        self._head_open = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._head_open = False
        self._disarm()
        self.guard.idle.pop(self, None)
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._in_request() and not self.transport.is_closing():
            self.guard.idle[self] = None
            if self._head_open:
                self._arm()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, msg, "malformed_http")

    def _refuse(self, status: int, message: str, code: str) -> None:
        """Answer without an application and close."""
        body = ApiError(status, message, code=code).json()
        reason = {400: "Bad Request", 408: "Request Timeout", 431: "Request Header Fields Too Large"}[status]
        head = f"HTTP/1.1 {status} {reason}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(head.encode() + b"connection: close\r\n\r\n" + body)
        self.transport.close()
