"""Checks every request before its endpoint sees it: host, origin, API key. Reads bodies within limits, sets request
ids, writes the access log, and turns exceptions into errors.

Nothing secret is logged: no headers, no query string, no body.
"""

from __future__ import annotations

import asyncio
import functools
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
from xllm_compiler.runtime.server.access import Cors, Hosts, host_name, is_same_origin
from xllm_compiler.runtime.server.budget import Hold
from xllm_compiler.runtime.server.context import Context
from xllm_compiler.runtime.server.engine_client import ClientGone
from xllm_compiler.runtime.server.errors import ApiError, bad_request, from_xllm, unavailable
from xllm_compiler.runtime.server.streaming import error_response

log = logging.getLogger("xllm.server")
access = logging.getLogger("xllm.access")

OPEN_PATHS = frozenset(("/health", "/ping", "/metrics", "/version"))  # for probes and scrapers, which hold no key
_SAFE_METHODS = frozenset(("GET", "HEAD", "OPTIONS"))  # they change nothing, and a page may not read their answers
_SWALLOW_BYTES = 64 * 2**20  # of a refused body that a client is still sending
_SWALLOW_SECONDS = 5.0
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class Middleware:
    """The outermost ASGI application."""

    def __init__(
        self, app: ASGIApp, ctx: Context, keys: tuple[str, ...], *, hosts: Hosts, cors: Cors, access_log: bool
    ) -> None:
        self.app = app
        self.ctx = ctx
        self.keys = tuple(key.encode() for key in keys)
        self.hosts = hosts
        self.cors = cors.middleware()
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

        answer: Send = tagged
        if "origin" in headers:  # errors too must be readable for a page that may read answers
            answer = functools.partial(self.cors.send, send=tagged, request_headers=headers)
        try:
            self._check_host(scope, headers)
            if scope["method"] == "OPTIONS" and "access-control-request-method" in headers and "origin" in headers:
                await self.cors.preflight_response(headers)(scope, receive, tagged)  # it never carries a key
            else:
                self._check_origin(scope, headers)
                self._authorize(scope["path"], headers)
                await self.app(scope, receive, answer)
        except ClientGone:
            status = 499  # nginx's number for a client that hung up; nobody receives it
        except asyncio.CancelledError:
            raise
        except Exception as error:
            if status:  # too late for an answer; the server closes the connection
                raise
            await error_response(_explain(error))(scope, receive, answer)
        finally:
            self._account(scope, status, time.monotonic() - start)

    def _check_host(self, scope: Scope, headers: Headers) -> None:
        """One Host header that names this server; HTTP/1.0 may do without."""
        given = headers.getlist("host")
        if not given and scope["http_version"] == "1.0":
            return
        if len(given) != 1:
            raise bad_request(f"{len(given) or 'no'} Host headers; send one", code="malformed_http")
        try:
            name = host_name(given[0])
        except ValueError:
            raise bad_request("the Host header is not a host", code="malformed_http") from None
        if not self.hosts.allows(name):
            raise ApiError(
                403,
                f"this server does not go by the name {name[:100]!r}; it can be told with --allowed-hosts",
                type="permission_error",
                code="host_not_allowed",
            )

    def _check_origin(self, scope: Scope, headers: Headers) -> None:
        """A page of another origin may only call what it may read the answer of.

        With keys there is nothing to check: a page that has a key was given it.
        """
        origin = headers.get("origin")
        if origin is None or self.keys or scope["method"] in _SAFE_METHODS:
            return
        if not self.cors.is_allowed_origin(origin) and not is_same_origin(origin, headers.get("host", "")):
            raise ApiError(
                403,
                f"pages of {origin[:100]!r} may not call this server; it can be told with --allowed-origins",
                type="permission_error",
                code="origin_not_allowed",
            )

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


async def read_json_body(request: Request, limit: int, timeout: float, hold: Hold) -> bytes:
    """The whole body of a JSON request, counted in `hold`. Raises ClientGone, and ApiError:

    - 413 beyond `limit` bytes, with or without a Content-Length;
    - 408 when it takes longer than `timeout` seconds;
    - 503 when it has to make room for others;
    - 415 for another content type or none: a page may send those to any server behind its user's back.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        what = f"content type {kind[:100]!r} is not supported" if kind else "the request has no content type"
        raise ApiError(415, f"{what}; send content-type: application/json", code="content_type")
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
    in_time = False
    try:
        async with asyncio.timeout(timeout) as deadline:
            loop = asyncio.get_running_loop()

            def give_up() -> None:
                parts.clear()
                if not deadline.expired():
                    deadline.reschedule(loop.time())

            hold.give_up = give_up
            await _collect(request, limit, hold, parts)
            in_time = True
    except TimeoutError:
        pass  # and out of here, since the exception's frames hold what was collected
    if in_time and hold.size <= limit:
        hold.complete()
        return b"".join(parts)
    hold.release()
    parts.clear()
    if in_time:
        error = too_large
    elif hold.gone:
        error = unavailable("the server holds too many unfinished requests", code="too_many_bytes")
    else:
        raise ApiError(
            408, "the request's body did not arrive in time", code="request_timeout", headers={"connection": "close"}
        )
    error.headers["connection"] = "close"
    await _swallow(request)
    raise error


async def _collect(request: Request, limit: int, hold: Hold, parts: list[bytes]) -> None:
    """The body into `parts`, until its end or until it is larger than `limit` bytes."""
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        body = message.get("body", b"")
        parts.append(body)
        hold.add(len(body))
        if hold.gone:
            await asyncio.Event().wait()  # until the deadline, which is now
        if hold.size > limit or not message.get("more_body", False):
            return


async def _swallow(request: Request) -> None:
    """Read on and drop, within bounds.

    Most clients read the answer only after sending everything. Closing with unread bytes resets the connection, and our
    answer would be lost.
    """
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
