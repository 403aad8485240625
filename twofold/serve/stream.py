"""How an answer leaves: as server-sent events or at once, and in both cases not at all when the client has gone.

A server that is asked nothing but "send" never learns that nobody reads: both ways race the client's leaving.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any, Protocol, TypeVar

from starlette.requests import ClientDisconnect, Request

from .answers import DONE, PING, event
from .calls import Call
from .choice import Piece
from .errors import HttpError
from .guard import Receive, Scope, Send
from .shape import by_choice

T = TypeVar("T")


class Shaped(Protocol):
    """How a call's answer looks: whole, or as what a stream opens with, its pieces, and what it closes with."""

    def whole(self, call: Call, pieces: Sequence[list[Piece]]) -> Any: ...
    def opening(self, call: Call) -> Sequence[Any]: ...
    def worth(self, piece: Piece) -> bool: ...
    def parts(self, piece: Piece) -> list[Piece]: ...
    def chunk(self, call: Call, pieces: Sequence[Piece]) -> Any: ...
    def closing(self, call: Call) -> Sequence[Any]: ...


HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]


async def until_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client leaves first.

    Raises:
        ClientDisconnect: it did.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def collect(call: Call) -> list[list[Piece]]:
    """Everything that a call says, by choice."""
    found: list[list[Piece]] = [[] for _ in call.choices]
    async for batch in call.pieces():
        for piece in batch:
            found[piece.index].append(piece)
    return found


async def whole(request: Request, call: Call, shape: Shaped) -> Any:
    """The one answer of a call that is not streamed."""
    async with call:
        return shape.whole(call, call.settle(await until_gone(request.receive, collect(call))))


class EventStream:
    """A response that sends a call piece by piece; `ping` is the seconds of silence after which a comment is sent."""

    def __init__(self, call: Call, shape: Shaped, ping: float) -> None:
        self.call = call
        self.shape = shape
        self.ping = ping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self.call:
            await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
            await until_gone(receive, self._write(send))

    async def _write(self, send: Send) -> None:
        try:
            async for data in self._events():
                await send({"type": "http.response.body", "body": data, "more_body": True})
        except HttpError as error:
            await send({"type": "http.response.body", "body": b"data: " + error.body() + b"\n\n", "more_body": True})
        await send({"type": "http.response.body", "body": DONE, "more_body": False})

    async def _events(self) -> AsyncIterator[bytes]:
        call, shape = self.call, self.shape
        for opening in shape.opening(call):
            yield event(opening)
        async for batch in call.pieces(self.ping):
            if not batch:
                yield PING
                continue
            pieces = [part for piece in by_choice(batch) if shape.worth(piece) for part in shape.parts(piece)]
            if pieces:
                yield b"".join(event(shape.chunk(call, [piece])) for piece in pieces)
        for closing in shape.closing(call):
            yield event(closing)
