"""Switch: a request's way to the model that it names, with patience while that is brought into memory.

A stream that waits for long is begun at once and kept alive with comments; what goes wrong then is its last event.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any
from urllib.parse import parse_qs

import msgspec
from starlette.requests import Request

from ..core import TwofoldError
from .answers import DONE, PING
from .errors import HttpError
from .fleet import Fleet, Hold
from .guard import Message, Receive, Scope, Send, in_shape
from .stream import HEADERS, until_gone

STREAMS = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages")
# What is done in the front alone, once the model has been seen.
LIGHT = ("/tokenize", "/detokenize", "/v1/messages/count_tokens")
# What is no model's.
NOBODYS = ("/v1/files", "/v1/batches", "/v1/responses/", "/reload")


class Peek(msgspec.Struct):
    """All that is read of a body here; the route reads the rest, and says what is wrong."""

    model: Any = None
    stream: Any = None


class Switch:
    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, first = scope["path"], self.fleet.members[0]
        if scope["method"] != "POST":
            asked = parse_qs(scope["query_string"].decode("latin-1")).get("model", [""])[0]
            await self.fleet.member(first.api.shared.api(asked)).app(scope, receive, send)
            return
        if path.startswith(NOBODYS):
            await first.app(scope, receive, send)
            return
        body = await Request(scope, receive).body()
        peek = _peek(body)
        member = self.fleet.member(first.api.shared.api(peek.model if isinstance(peek.model, str) else None))
        again = _Again(body, receive)
        if path in LIGHT and member.client.info is not None:
            await member.app(scope, again, send)
            return
        hold, late = Hold(self.fleet, member), Late(send, path)
        seconds = member.api.deadline(Request(scope)) - time.monotonic()
        try:
            ping = member.api.config.ping_seconds if peek.stream is True and path in STREAMS else None
            await until_gone(receive, _wait(hold, late, seconds, ping))
            await member.app(scope, again, late.send)
        except TwofoldError as error:
            if not late.begun:
                raise
            await late.fail(HttpError.of(error))
        finally:
            hold.release()


async def _wait(hold: Hold, late: Late, seconds: float, ping: float | None) -> None:
    """Until the model is there; pings when silence has lasted for `ping` seconds."""
    taking = asyncio.ensure_future(hold.take())
    ends = time.monotonic() + seconds
    try:
        while not taking.done():
            left = ends - time.monotonic()
            if left <= 0:
                raise HttpError(504, "the model was not in memory in time: allow more", code="timeout")
            await asyncio.wait({taking}, timeout=left if ping is None else min(ping, left))
            if not taking.done() and ping is not None:
                await late.ping()
        taking.result()
    finally:
        taking.cancel()


class Late:
    """A `send` for an answer that may have begun before its route is asked."""

    def __init__(self, send: Send, path: str) -> None:
        self._send = send
        self._path = path
        self.begun = False

    async def ping(self) -> None:
        if not self.begun:
            self.begun = True
            await self._send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        await self._send({"type": "http.response.body", "body": PING, "more_body": True})

    async def fail(self, error: HttpError) -> None:
        """The last event."""
        if in_shape(self._path):
            data = b"event: error\ndata: " + error.body(anthropic=True) + b"\n\n"
        else:
            data = b"data: " + error.body() + b"\n\n" + DONE
        await self._send({"type": "http.response.body", "body": data, "more_body": False})

    async def send(self, message: Message) -> None:
        if self.begun and message["type"] == "http.response.start":
            return
        await self._send(message)


def _peek(body: bytes) -> Peek:
    try:
        return msgspec.json.decode(body, type=Peek)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return Peek()


class _Again:
    """A body that was read, told once more; `after` is what comes after it."""

    def __init__(self, body: bytes, after: Receive) -> None:
        self._body: bytes | None = body
        self.after = after

    async def __call__(self) -> Message:
        if self._body is None:
            return await self.after()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}
