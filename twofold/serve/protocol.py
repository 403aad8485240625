"""GuardedProtocol: uvicorn's HTTP/1.1 protocol with limits on what arrives before any request exists.

Out of the box uvicorn takes an 8 MB header, 20,000 headers, and headers that never end. Here the head of a request has
a size, a count and a time, connections have a number, and trailers cannot become headers.

    connection ──▶ head: bytes, count, seconds ──▶ body: bytes, seconds (guard.py) ──▶ answer: seconds unread
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from .config import Limits
from .errors import HttpError


class _Refused(Exception):
    """Raised inside a parser callback; the parser turns it into its own error."""


class GuardedProtocol(HttpToolsProtocol):
    """`limits` is set on a subclass by `guarded`, since uvicorn makes the instances."""

    limits: Limits

    def __init__(self, config: Config, server_state: ServerState, app_state: dict[str, Any], **kw: Any) -> None:
        super().__init__(config, server_state, app_state, **kw)
        self._reading_head = True
        self._head_bytes = 0
        self._head_count = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._refusal: HttpError | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            self._refuse(HttpError(503, "too many connections: try again soon", retry_after=1))
            return
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        if self._write_timer is not None:
            self._write_timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client reads slower than we write; the app waits, and so does a timer."""
        super().pause_writing()
        self._write_timer = self.loop.call_later(self.limits.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._reading_head:
            self._head_bytes += len(data)
            if self._head_timer is None:
                self._arm()
        super().data_received(data)
        if self._reading_head and self._head_bytes > self.limits.header_bytes and not self.transport.is_closing():
            self._refuse(self._too_large())

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls for every parser error: answer with what was really wrong."""
        self._refuse(self._refusal or HttpError(400, "this is not an HTTP/1.1 request", code="bad_http"))

    # -- parser callbacks -------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._head_count = 0
        self._parsed_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_count += 1
        self._count(len(name) + len(value) + 4)
        if self._head_count > self.limits.headers:
            self._refusal = HttpError(431, f"more than {self.limits.headers} headers: send fewer")
            raise _Refused
        if self._reading_head:  # afterwards they are trailers, which nobody here believes
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._reading_head = False
        self._head_bytes = 0
        self._disarm()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._reading_head = True
        super().on_message_complete()

    # -- limits -----------------------------------------------------------------------------------------------------

    def _count(self, size: int) -> None:
        self._parsed_bytes += size
        if self._parsed_bytes > self.limits.header_bytes:
            self._refusal = self._too_large()
            raise _Refused

    def _too_large(self) -> HttpError:
        return HttpError(431, f"the request's head is more than {self.limits.header_bytes} bytes: send less")

    def _arm(self) -> None:
        self._head_timer = self.loop.call_later(self.limits.header_seconds, self._head_late)

    def _disarm(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_late(self) -> None:
        self._refuse(HttpError(408, f"the request's head did not end within {self.limits.header_seconds:g} seconds"))

    def _refuse(self, error: HttpError) -> None:
        """Answer and close; in the middle of another answer there is nothing to say, only to close."""
        self._disarm()
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete:
            lines = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}".encode(), b"connection: close"]
            lines += [name + b": " + value for name, value in error.headers()]
            self.transport.write(b"\r\n".join(lines) + b"\r\n\r\n" + error.body())
        self.transport.close()


def guarded(limits: Limits) -> type[GuardedProtocol]:
    """The protocol class to hand to uvicorn."""
    return type("GuardedProtocol", (GuardedProtocol,), {"limits": limits})
