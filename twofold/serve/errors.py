"""Errors in OpenAI's shape (below /v1/messages in Anthropic's), and which HTTP status each error of Twofold is."""

from __future__ import annotations

import msgspec

from ..core import CapacityError, RequestError, TwofoldError, WorkerError

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "invalid_request_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


ANTHROPIC = "/v1/messages"
ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class ErrorDetail(msgspec.Struct):
    message: str
    type: str
    param: str | None = None
    code: str | int | None = None


class ErrorBody(msgspec.Struct):
    error: ErrorDetail


class AnthropicDetail(msgspec.Struct):
    type: str
    message: str


class AnthropicError(msgspec.Struct, tag="error"):
    error: AnthropicDetail


class HttpError(TwofoldError):
    """An error with the status it is answered with; `retry_after` in whole seconds."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.retry_after = retry_after

    @classmethod
    def of(cls, error: Exception, retry_after: int = 1) -> HttpError:
        """What a client is told of any error; one that nobody foresaw is told nothing of the inside."""
        if isinstance(error, HttpError):
            return error
        message = str(error)
        if isinstance(error, RequestError):
            return cls(400, message, param=error.param, code="invalid_value")
        if isinstance(error, CapacityError):
            return cls(429, message, code="queue_full", retry_after=retry_after)
        if isinstance(error, WorkerError):
            return cls(503, message, code="unavailable", retry_after=max(retry_after, 2))
        return cls(500, "the server met an error of its own; its log has the request id", code="internal_error")

    def body(self, anthropic: bool = False) -> bytes:
        if anthropic:
            kind = ANTHROPIC_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")
            place = f"{self.param}: " if self.param and self.param not in str(self) else ""
            return msgspec.json.encode(AnthropicError(AnthropicDetail(kind, place + str(self))))
        kind = TYPES.get(self.status, "server_error")
        return msgspec.json.encode(ErrorBody(ErrorDetail(str(self), kind, self.param, self.code or self.status)))

    def headers(self, body: bytes | None = None) -> list[tuple[bytes, bytes]]:
        """The headers of the answer, lower case; `body` is what is sent where that is not OpenAI's shape."""
        size = len(self.body() if body is None else body)
        found = [(b"content-type", b"application/json"), (b"content-length", str(size).encode())]
        if self.retry_after is not None:
            found.append((b"retry-after", str(self.retry_after).encode()))
        return found
