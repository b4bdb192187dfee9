"""The door: every request passes here first. Owns keys, body limits, request ids, the access log and what becomes of
exceptions. Must not know what endpoints do.

Nothing secret is logged: no headers, no query string, no body.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import time
import uuid
from urllib.parse import quote

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from xllm_compiler.errors import XllmError
from xllm_compiler.runtime.server.bridge import ClientGone
from xllm_compiler.runtime.server.context import Context
from xllm_compiler.runtime.server.errors import ApiError, from_xllm
from xllm_compiler.runtime.server.streaming import error_response

log = logging.getLogger("xllm.server")
access = logging.getLogger("xllm.access")

OPEN_PATHS = frozenset(("/health", "/ping", "/metrics", "/version"))  # for probes and scrapers, which hold no key
_SWALLOW_BYTES = 64 * 2**20  # of a refused body that a client is still sending
_SWALLOW_SECONDS = 5.0
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class Gate:
    """The outermost ASGI application."""

    def __init__(self, app: ASGIApp, ctx: Context, keys: tuple[str, ...], *, access_log: bool) -> None:
        self.app = app
        self.ctx = ctx
        self.keys = tuple(key.encode() for key in keys)
        self.access_log = access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        start = time.monotonic()
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope["app"] = self  # makes the router raise for a wrong method, where it would answer in plain text
        status = 0

        async def tagged(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message.setdefault("headers", []).append((b"x-request-id", request_id.encode()))
            await send(message)

        try:
            self._authorize(scope["path"], headers)
            await self.app(scope, receive, tagged)
        except ClientGone:
            status = 499  # nginx's number for a client that hung up; nobody receives it
        except asyncio.CancelledError:
            raise
        except Exception as error:
            if status:  # too late for an answer; the server closes the connection
                raise
            await error_response(_explain(error))(scope, receive, tagged)
        finally:
            self._account(scope, status, time.monotonic() - start)

    def _authorize(self, path: str, headers: Headers) -> None:
        if not self.keys or path in OPEN_PATHS:
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        offered = key.strip().encode("latin-1", errors="replace")
        # Every key is compared, so the time taken tells nothing about which of them came close.
        matches = [hmac.compare_digest(offered, known) for known in self.keys]
        if scheme.lower() != "bearer" or not any(matches):
            raise ApiError(
                401,
                "a valid API key is needed: send `Authorization: Bearer <key>`",
                type="authentication_error",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )

    def _account(self, scope: Scope, status: int, seconds: float) -> None:
        route = scope.get("route")
        handler = getattr(route, "path", "none")  # not the raw path: a scanner would make a label for each guess
        self.ctx.metrics.http[scope["method"], handler, status] += 1
        if self.access_log and access.isEnabledFor(logging.INFO):
            client = scope.get("client")
            access.info(
                "%s %s %s %d %.1fms",
                f"{client[0]}:{client[1]}" if client else "-",
                scope["method"],
                quote(scope["path"][:200]),
                status,
                seconds * 1e3,
            )


def _explain(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, XllmError):
        if error.kind not in ("request", "capacity"):
            log.error("a request failed: %s", error)
        return from_xllm(error)
    if isinstance(error, HTTPException):
        if error.status_code == 405:
            allow = (error.headers or {}).get("Allow", "")
            return ApiError(405, f"method not allowed; use {allow}", code="method_not_allowed", headers=error.headers)
        return ApiError(error.status_code, error.detail, headers=error.headers)
    log.error("a request failed", exc_info=error)
    return from_xllm(XllmError("internal", str(error)))


async def read_json_body(request: Request, limit: int, timeout: float) -> bytes:
    """The whole body of a JSON request.

    Raises ApiError 413 beyond `limit` bytes, with or without a Content-Length, 408 when it takes longer than `timeout`
    seconds, 415 for another content type (which also keeps web pages from posting here behind a user's back), and
    ClientGone.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind and kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise ApiError(415, f"content type {kind[:100]!r} is not supported; send application/json", code="content_type")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "compressed bodies are not supported", code="content_encoding")
    too_large = ApiError(
        413, f"the body is larger than {limit} bytes", code="body_too_large", headers={"connection": "close"}
    )
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        if "expect" not in request.headers:  # otherwise the client has not begun to send it
            await _swallow(request)
        raise too_large
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(timeout):
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                body = message.get("body", b"")
                size += len(body)
                if size > limit:
                    break
                parts.append(body)
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError:
        raise ApiError(
            408, "the request's body did not arrive in time", code="request_timeout", headers={"connection": "close"}
        ) from None
    await _swallow(request)
    raise too_large


async def _swallow(request: Request) -> None:
    """Read on and drop, within bounds. Most clients read the answer only after sending everything, and closing with
    unread bytes resets the connection, which would take our answer with it."""
    left = _SWALLOW_BYTES
    try:
        async with asyncio.timeout(_SWALLOW_SECONDS):
            while left > 0:
                message = await request.receive()
                left -= len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return
    except TimeoutError:
        return
