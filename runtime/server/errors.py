"""Failures as clients see them: OpenAI's error object, and an HTTP status for each kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from xllm_compiler.errors import XllmError


class ApiError(Exception):
    """A failure that a client is told about, in the shape that OpenAI's clients parse.

    `param` is the field to blame, `code` a stable word for programs, `headers` go out with the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """`{"error": {...}}`, OpenAI's error object."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def json(self) -> bytes:
        return msgspec.json.encode(self.body())


def bad_request(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the request itself is wrong; sending it again cannot help."""
    return ApiError(400, message, param=param, code=code)


def unavailable(message: str, *, code: str, status: int = 503, retry_after: int = 1) -> ApiError:
    """503 or 429: a sound request at a bad moment; `retry_after` is in seconds."""
    return ApiError(
        status,
        message,
        type="rate_limit_error" if status == 429 else "server_error",
        code=code,
        headers={"retry-after": str(retry_after)},
    )


def from_xllm(error: XllmError, *, param: str | None = None) -> ApiError:
    """What a client sees of an `XllmError` raised below the server.

    A request's fault is 400 with the field (`where`) and the instruction (`help`); "capacity" is 400 too, because the
    runtime raises it only for what can never fit (a full queue is the server's own 429). Anything else is our fault:
    500, and the details stay in the log.
    """
    if error.kind in ("request", "capacity"):
        message = f"{error.message} {error.help}".strip() if error.help else error.message
        code = "capacity" if error.kind == "capacity" else None
        return bad_request(message, param=param or error.where or None, code=code)
    return ApiError(500, "internal error; the server's log says more", type="server_error", code="internal_error")
