"""Guards connections: how long a request may take to arrive, how large its head may be, how many connections there are.

This is the protocol class given to uvicorn. By itself uvicorn waits for ever for a first byte, and takes heads of any
size and any number of trailers. It also parses whatever arrives while a response runs.
"""

from __future__ import annotations

import asyncio
import time
from asyncio.events import TimerHandle
from collections import Counter, OrderedDict

import httptools
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from xllm_compiler.runtime.server.budget import Budget, Hold
from xllm_compiler.runtime.server.errors import ApiError, unavailable

MAX_HEAD_BYTES = 64 * 2**10  # of a message beside its body: request line, headers, trailers, chunk extensions
MAX_HEADERS = 256  # a header costs more memory than its bytes
WRITE_STALL_SECONDS = 120.0  # a client may leave an answer unread for so long
LINGER_SECONDS = 1.0  # what is still being sent is read after a refusal: closing on unread bytes would reset the answer
NEW_SECONDS = 0.5  # a younger connection is not evicted: its request may lie unread in the kernel
_MOST_LINGERED = 4 * 2**20  # bytes that are read so
_MOST_REFUSED = 16  # connections beyond the limit that are told so at a time; more are just closed
_MOST_DISCARDED = 64 * 2**20  # of a body that is still arriving after its request has been answered
_MOST_WAITING = 64 * 2**10  # unparsed bytes of further requests, beyond which nothing is read from the connection
# The parser says what it met, but not where. In small pieces the count of a message's bytes is exact but for its end,
# and no more than a piece is parsed beyond the request that is being answered.
_PIECE = 512
_BODY_PIECE = 64 * 2**10  # where a Content-Length says that there is nothing but body
# Parsing is shared out: what one client sends as fast as it can must not keep others waiting. libuv alone would read
# eight megabytes from one socket before it looks at the next.
_SMALL = 4 * 2**10  # bytes that are parsed at once; more has to have time
_TURN_SECONDS = 0.005  # for all connections, between two looks at the sockets
_SHARE_SECONDS = 0.001  # of it for one


class ConnectionGuard:
    """Counts connections and remembers the idle ones, oldest first. One per server; the event loop's thread only."""

    def __init__(self, max_connections: int, receive_timeout: float, budget: Budget) -> None:
        self.max_connections = max_connections
        self.receive_timeout = receive_timeout
        self.budget = budget
        self.open = 0
        self.idle: OrderedDict[GuardedProtocol, float] = OrderedDict()  # since when
        self.timed_out = 0
        self.evicted = 0
        self.refused: Counter[str] = Counter()  # requests that no application saw, by the error's code
        self._queue: OrderedDict[GuardedProtocol, None] = OrderedDict()  # they have bytes to parse
        self._turn_end = 0.0
        self._turning = False

    def protocol_class(self) -> type[GuardedProtocol]:
        """The class for uvicorn, which makes protocols from a class alone: so the class carries the guard."""
        return type("BoundProtocol", (GuardedProtocol,), {"guard": self})

    def share(self, loop: asyncio.AbstractEventLoop) -> float:
        """Until when one connection may parse now, on `time.monotonic()`'s clock; that may be over."""
        now = time.monotonic()
        if not self._turning:
            self._turning = True
            self._turn_end = now + _TURN_SECONDS
            loop.call_soon(self._turn, loop)
        return min(self._turn_end, now + _SHARE_SECONDS)

    def enqueue(self, protocol: GuardedProtocol, loop: asyncio.AbstractEventLoop) -> None:
        self._queue.setdefault(protocol)
        self.share(loop)

    def is_queued(self, protocol: GuardedProtocol) -> bool:
        return protocol in self._queue

    def forget(self, protocol: GuardedProtocol) -> None:
        self.idle.pop(protocol, None)
        self._queue.pop(protocol, None)

    def _turn(self, loop: asyncio.AbstractEventLoop) -> None:
        """Let those in the queue parse, each once, as far as time goes."""
        if not self._queue:
            self._turning = False
            return
        self._turn_end = time.monotonic() + _TURN_SECONDS
        for _ in range(len(self._queue)):
            protocol, _ = self._queue.popitem(last=False)
            protocol.go_on()
            if not self._queue or time.monotonic() >= self._turn_end:
                break
        loop.call_soon(self._turn, loop)

    def make_room(self, newcomer: GuardedProtocol) -> None:
        """Too many connections: close the one that has been idle longest, or turn the new one away."""
        if self.open <= self.max_connections:
            return
        victim, since = next(iter(self.idle.items()), (None, 0.0))
        if victim is not None and time.monotonic() - since >= NEW_SECONDS:
            del self.idle[victim]
            self.evicted += 1
            victim.transport.close()
            return
        newcomer.refuse(
            unavailable("the server has too many connections", code="too_many_connections"),
            linger=self.open <= self.max_connections + _MOST_REFUSED,
        )


class _Flow(FlowControl):
    """Pauses reading while `hold` or the request that is being answered asks for it."""

    _held = False
    _wished = False

    def pause_reading(self) -> None:
        self._wished = True
        super().pause_reading()

    def resume_reading(self) -> None:
        self._wished = False
        if not self._held:
            super().resume_reading()

    def hold(self, held: bool) -> None:
        self._held = held
        if held:
            super().pause_reading()
        elif not self._wished:
            super().resume_reading()


class _Refused(Exception):
    """The parser's callbacks raise it after leaving the reason in `_refusal`."""


class GuardedProtocol(HttpToolsProtocol):
    """HTTP/1.1 with a deadline for the head of every request, a bound on what surrounds its body, and eviction of idle
    connections.

    A connection is idle from the moment it opens, or from the end of a response, until a request's head is complete.
    What a client sends behind a request that is being answered waits as bytes, and is not parsed before its turn.
    """

    guard: ConnectionGuard
    flow: _Flow
    _head_timer: TimerHandle | None = None
    _write_timer: TimerHandle | None = None
    _linger_timer: TimerHandle | None = None
    _counted = False
    _refusal: ApiError | None = None  # what to say, and then to close
    _lingering = False
    _hold: Hold | None = None
    _rest: bytes = b""  # received and not parsed
    # Of the message that is being parsed:
    _head_open = False
    _whole = True  # it is complete, or none has begun
    _beside = 0  # its bytes that are not body
    _body_in_piece = 0
    _body_left = 0  # of what Content-Length announced
    _chunk = 0
    _discarded = 0
    _past_parser = False  # its body does not go through the parser

    # connections

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = _Flow(transport)
        self._counted = True
        self.guard.open += 1
        self.guard.idle[self] = time.monotonic()
        self._arm()
        self.guard.make_room(self)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._counted:
            self._counted = False
            self.guard.open -= 1
        self.guard.forget(self)
        self._rest = b""
        if self._hold is not None:
            self._hold.release()
        if self._linger_timer is not None:
            self._linger_timer.cancel()
        for cycle, _ in self.pipeline:  # never begun
            cycle.disconnected = True
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
        if self.transport.is_closing() or self._lingering or self._in_request():
            return
        self.guard.timed_out += 1
        if self._head_open:
            self.refuse(ApiError(408, "the request's head did not arrive in time", code="request_timeout"))
        else:
            self.transport.close()

    # bytes

    def data_received(self, data: bytes) -> None:
        if self._lingering or self._refusal is not None or self.transport.is_closing():
            self._discard(len(data), _MOST_LINGERED)
            return
        self._unset_keepalive_if_required()
        if not self._in_request():
            self._arm()
        end = self.guard.share(self.loop)
        if self.guard.is_queued(self):
            self._keep(self._rest + data)
        else:
            self._parse(self._rest + data if self._rest else data, end)

    def _parse(self, data: bytes, end: float) -> None:
        """Parse as far as it is this connection's turn, and until `end`; keep the rest."""
        view, at = memoryview(data), 0
        while at < len(view) and not self._must_wait():
            if at >= _SMALL and time.monotonic() >= end:
                self.guard.enqueue(self, self.loop)
                break
            size = min(self._body_left, _BODY_PIECE) or _PIECE
            at += self._parse_piece(view[at : at + size])
            if self._refusal is not None:
                self._rest = b""
                self._give_refusal()
                return
            if self.transport.is_closing():
                self._rest = b""
                return
        self._keep(bytes(view[at:]))

    def _keep(self, rest: bytes) -> None:
        """Keep bytes for later. With enough of them, or no time to parse, stop reading from the connection."""
        self._rest = rest
        if len(rest) > _MOST_WAITING or self.guard.is_queued(self):
            self.flow.hold(True)
        size = len(self._rest) + (self._beside if self._head_open else 0)
        if size or self._hold is not None:
            if self._hold is None:
                self._hold = self.guard.budget.hold(self._give_way)
            self._hold.set(size)

    def _must_wait(self) -> bool:
        """Whether what comes next belongs to a request whose turn has not come."""
        return bool(self.pipeline) or (self._whole and self._in_request())

    def _parse_piece(self, piece: memoryview) -> int:
        """How much of the piece is done with. Leaves a `_refusal` when it must not be taken."""
        if self._past_parser:
            self.on_body(bytes(piece))
            if not self._body_left:
                self._past_parser = False
                self.on_message_complete()
            return len(piece)
        size = len(piece)
        self._body_in_piece = 0
        self._ended = False
        try:
            self.parser.feed_data(piece)
        except httptools.HttpParserUpgrade as upgrade:  # it stops behind such a head; we do not upgrade, so go on
            size = int(upgrade.args[0])
        except httptools.HttpParserError:
            if self._refusal is None:
                self._refusal = ApiError(400, "Invalid HTTP request received.", code="malformed_http")
            return size
        if self._ended:
            self._beside = 0  # what followed in this piece is forgiven
        else:
            self._beside += size - self._body_in_piece
            if self._beside > MAX_HEAD_BYTES:
                self._refusal = _too_large("head" if self._head_open or self._whole else "framing")
        return size

    def go_on(self) -> None:
        """What waited, for time or for the end of a response, has its turn."""
        if self.transport.is_closing() or self._lingering:
            return
        self._unset_keepalive_if_required()
        if not self._in_request():
            self._arm()
        data, self._rest = self._rest, b""
        self._parse(data, self.guard.share(self.loop))
        if len(self._rest) <= _MOST_WAITING and not self.guard.is_queued(self):
            self.flow.hold(False)

    # the parser's callbacks

    def on_message_begin(self) -> None:
        self._head_open, self._whole = True, False
        self._body_left = self._discarded = 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._head_open:
            return  # a trailer: nobody reads those
        if len(self.headers) >= MAX_HEADERS:
            self._refusal = ApiError(431, f"more than {MAX_HEADERS} headers", code="head_too_large")
            raise _Refused
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._check_framing()
        self._check_target()
        self._head_open = False
        self._disarm()
        self.guard.idle.pop(self, None)
        super().on_headers_complete()

    def _check_framing(self) -> None:
        """How long the body is, and whether it is encoded in a way that we decode: `chunked` or not at all."""
        codings = [value.strip().lower() for name, value in self.headers if name == b"transfer-encoding"]
        if codings and (codings != [b"chunked"] or self.parser.get_http_version() != "1.1"):
            named = b", ".join(codings).decode("latin-1")[:100]
            self._refusal = ApiError(
                501, f"transfer-encoding {named!r} is not supported; chunked is", code="transfer_encoding"
            )
            raise _Refused
        for name, value in self.headers:
            if name == b"content-length":
                self._body_left = int(value)
        if self.parser.should_upgrade():  # a request to, which we pass over; the parser takes the body for more heads
            if codings:
                self._refusal = ApiError(400, "a chunked body cannot come with Upgrade", code="malformed_http")
                raise _Refused
            self._past_parser = self._body_left > 0

    def _check_target(self) -> None:
        """A target with a host in it overrides the Host header (RFC 9112, 3.2.2)."""
        if self.url.startswith(b"/"):
            return
        target = httptools.parse_url(self.url)
        if target.schema is None or target.schema.lower() not in (b"http", b"https") or not target.host:
            self._refusal = ApiError(400, "the request's target is not a path", code="malformed_http")
            raise _Refused
        host = b"[%s]" % target.host if b":" in target.host else target.host
        if target.port:
            host += b":%d" % target.port
        self.headers[:] = [(name, value) for name, value in self.headers if name != b"host"] + [(b"host", host)]
        if target.path is None:
            self.url = b"/" + (b"?" + target.query if target.query else b"")

    def on_body(self, body: bytes) -> None:
        self._body_in_piece += len(body)
        self._chunk += len(body)
        self._body_left = max(0, self._body_left - len(body))
        if not self.cycle.response_complete:
            super().on_body(body)
            return
        self._discard(len(body), _MOST_DISCARDED)

    def _discard(self, size: int, most: int) -> None:
        self._discarded += size
        if self._discarded > most:
            self.transport.close()

    def on_chunk_header(self) -> None:
        self._chunk = 0

    def on_chunk_complete(self) -> None:
        # What a chunk needs around it is no offence, unless there is more of it than of the chunk.
        self._beside -= min(self._chunk, len(f"{self._chunk:x}") + 4)

    def on_message_complete(self) -> None:
        if self._past_parser:
            return  # the parser believes so
        self._whole = self._ended = True
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            return
        if not self._in_request():
            self.guard.idle[self] = time.monotonic()
            if self._head_open:
                self._arm()
            if self._refusal is not None:
                self.refuse(self._refusal)
                return
        if self._rest:
            self.guard.enqueue(self, self.loop)

    # refusals

    def _give_refusal(self) -> None:
        """Say why the parser was stopped: now, or after the response that is running."""
        assert self._refusal is not None
        if not self._in_request():
            self.refuse(self._refusal)
        elif not self._head_open and not self._whole:  # it is about the body of the last request
            if self.pipeline or self.cycle.response_started:
                self.transport.close()
                return
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            self.refuse(self._refusal)

    def _give_way(self) -> None:
        """End this request: all connections hold too many bytes, and it has been arriving longest."""
        self._rest = b""
        if self._in_request():
            self.transport.close()
        else:
            self.refuse(unavailable("the server holds too many unfinished requests", code="too_many_bytes"))

    def refuse(self, error: ApiError, *, linger: bool = True) -> None:
        """Answer without an application and close."""
        if self.transport.is_closing() or self._lingering:
            return
        self._refusal = error
        self.guard.forget(self)
        self.guard.refused[error.code or ""] += 1
        self._disarm()
        body = error.json()
        lines = [STATUS_LINE[error.status]]
        headers = {**error.headers, "content-type": "application/json", "content-length": str(len(body))}
        lines += [f"{name}: {value}\r\n".encode() for name, value in {**headers, "connection": "close"}.items()]
        self.transport.write(b"".join([*lines, b"\r\n", body]))
        if not linger:
            self.transport.close()
            return
        self._lingering = True
        self._discarded = 0
        self._rest = b""
        if self._hold is not None:
            self._hold.release()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._linger_timer = self.loop.call_later(LINGER_SECONDS, self.transport.close)


def _too_large(what: str) -> ApiError:
    if what == "head":
        text = f"the request's head is larger than {MAX_HEAD_BYTES} bytes"
        return ApiError(431, text, code="head_too_large")
    text = f"the request's trailers or chunk extensions are larger than {MAX_HEAD_BYTES} bytes"
    return ApiError(431, text, code="framing_too_large")
