"""Errors as HTTP answers, in the shape that clients of OpenAI's API read."""

from __future__ import annotations

from typing import Any

from edgeprune.errors import (
    BackendError,
    CapacityError,
    EdgepruneError,
    InputError,
    SessionError,
    SpecError,
)

KINDS = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
"""`type` of an error by its status; the rest are the client's (4xx) or the server's (5xx)."""


class HttpError(EdgepruneError):
    """A request that is answered with an error; the message is one line for the client."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        """`param` is the field of the request that is wrong."""
        super().__init__(message)
        self.status, self.message = status, message
        self.param, self.code, self.headers = param, code, headers or {}

    def body(self) -> dict[str, Any]:
        """The JSON object of the answer, or of an event of a stream."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {
            "error": {
                "message": self.message,
                "type": KINDS.get(self.status, kind),
                "param": self.param,
                "code": self.code,
            }
        }


def refused(message: str, param: str | None = None) -> HttpError:
    """A request that cannot be met as it is written."""
    return HttpError(400, message, param)


def http_error(error: Exception) -> HttpError:
    """What a client is told of an error; nothing of the inside where it is none of ours."""
    if isinstance(error, HttpError):
        return error
    message = " ".join(str(error).split())
    if isinstance(error, CapacityError):
        return HttpError(400, message, "messages", "context_length_exceeded")
    if isinstance(error, (InputError, SpecError)):
        return refused(message)
    if isinstance(error, SessionError):
        told = "the engine failed and was opened again while it answered; ask again"
        return HttpError(503, told, code="engine_failed", headers={"Retry-After": "1"})
    if isinstance(error, BackendError):
        return HttpError(500, message, code="backend_error")
    return HttpError(
        500,
        f"the server failed ({type(error).__name__}); its log says where",
        code="internal_error",
    )
