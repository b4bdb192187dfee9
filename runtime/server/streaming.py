"""Sends an answer, whole or as server-sent events, and stops the work when the client hangs up."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from xllm_compiler.errors import XllmError
from xllm_compiler.runtime.outputs import Output
from xllm_compiler.runtime.server.engine_client import ClientGone, RequestStream
from xllm_compiler.runtime.server.errors import ApiError, from_xllm, unavailable
from xllm_compiler.runtime.server.held import Held

log = logging.getLogger("xllm.server")
T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
_PIECE = 2**18
_encode = msgspec.json.Encoder().encode


def event(value: object) -> bytes:
    """One server-sent event. JSON has no raw newlines, so one `data:` line is enough."""
    return b"data: " + _encode(value) + b"\n\n"


def json_response(value: object, status: int = 200) -> Response:
    return Response(_encode(value), status, media_type="application/json")


class WholeResponse(Response):
    """A whole answer, sent in pieces, since a transport takes everything it is given into memory.

    It counts as held until the client has nearly all of it.
    """

    def __init__(self, held: Held, value: object) -> None:
        super().__init__(_encode(value), media_type="application/json")
        self.held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = memoryview(self.body)
        self.held.used += len(body)
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            for start in range(0, len(body), _PIECE):
                piece = bytes(body[start : start + _PIECE])
                await send({"type": "http.response.body", "body": piece, "more_body": start + _PIECE < len(body)})
        finally:
            self.held.used -= len(body)


def error_response(error: ApiError) -> Response:
    return Response(error.json(), error.status, error.headers, "application/json")


def failure(output: Output) -> ApiError | None:
    """The error that a last event carries, if the client must be told of it."""
    if output.error is not None:
        if output.error.kind not in ("request", "capacity"):
            log.error("request %s failed: %s", output.request_id, output.error)
        return from_xllm(output.error)
    if output.finish_reason == "error":
        return ApiError(500, "the engine failed this request", type="server_error", code="internal_error")
    if output.finish_reason == "abort":
        return unavailable("the server stopped this request", code="aborted")
    return None


async def _watch(receive: Receive, stream: RequestStream) -> None:
    """Hang the stream up as soon as the client is gone. The request's body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass
    stream.hang_up()


async def until_hang_up(request: Request, stream: RequestStream, work: Callable[[], Awaitable[T]]) -> T:
    """Do `work`, which reads from `stream`; ClientGone from the moment the client disconnects."""
    watcher = asyncio.create_task(_watch(request.receive, stream))
    try:
        return await work()
    finally:
        stream.close()
        watcher.cancel()


class EventResponse(Response):
    """Server-sent events from an iterator of ready-made events.

    Nothing is sent before the first event is there, so a request that fails at once gets a plain HTTP error; a later
    failure is an event with an error object and the end of the stream.
    """

    media_type = "text/event-stream"

    def __init__(self, stream: RequestStream, events: AsyncIterator[bytes]) -> None:
        super().__init__(None, 200, {"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.stream = stream
        self.events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watcher = asyncio.create_task(_watch(receive, self.stream))
        started = False
        try:
            async for chunk in self._safe():
                if isinstance(chunk, ApiError):
                    if not started:
                        await error_response(chunk)(scope, receive, send)
                        return
                    chunk = event(chunk.body()) + DONE
                if not started:
                    started = True
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self.stream.close()
            watcher.cancel()

    async def _safe(self) -> AsyncIterator[bytes | ApiError]:
        """The events, with any failure as a last item."""
        try:
            async for chunk in self.events:
                yield chunk
        except ClientGone:
            raise
        except ApiError as error:
            yield error
        except XllmError as error:
            log.error("a stream failed: %s", error)
            yield from_xllm(error)
        except Exception:
            log.exception("a stream failed")
            yield ApiError(
                500, "internal error; the server's log says more", type="server_error", code="internal_error"
            )
