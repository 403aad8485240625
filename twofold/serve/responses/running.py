"""Run: one answer on its way, with any number of readers, none included.

A task writes the answer and its events; readers follow the events from wherever they are. In the foreground the one
reader's leaving stops the writing, in the background nothing does but a cancel.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from msgspec import json

from ..answers import PING
from ..calls import Call
from ..errors import HttpError
from ..guard import Receive, Scope, Send
from ..said import spoken
from ..shape import ChatShape
from ..stream import HEADERS, until_gone
from .builder import Builder, Event
from .shapes import Response


class Run:
    """`log` holds the events as they are sent, when `told`; `ended` is called once at the end."""

    def __init__(
        self, call: Call, shape: ChatShape, response: Response, *, told: bool, ended: Callable[[], None]
    ) -> None:
        self.response = response
        self.told = told
        self.log: list[bytes] = []
        self.error: HttpError | None = None
        self._call = call
        self._shape = shape
        self._ended = ended
        self._builder = Builder(response, self._tell)
        self._news = asyncio.Event()
        self._task = asyncio.create_task(self._write(), name=response.id)

    async def finished(self) -> Response:
        """The whole answer.

        Raises:
            HttpError: the engine gave it up.
        """
        await asyncio.shield(self._task)
        if self.error is not None:
            raise self.error
        return self.response

    async def stop(self) -> None:
        """End it where it is; what it has said stays."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        if self._task.cancelled():  # before its first step
            async with self._call:
                self._builder.cancel()
                self._ended()

    async def events(self, after: int, ping: float) -> AsyncIterator[bytes]:
        """Events number `after` + 1 and on, to the last; a comment after `ping` seconds of silence."""
        place = after + 1
        while True:
            if new := self.log[place:]:
                place += len(new)
                yield b"".join(new)  # and look again: more may have come while this was sent
                continue
            if self._task.done():
                return
            self._news.clear()
            try:
                async with asyncio.timeout(ping):
                    await self._news.wait()
            except TimeoutError:
                yield PING

    async def _write(self) -> None:
        try:
            async with self._call:
                self._builder.opening()
                async for said in spoken(self._call, self._shape):
                    if said is not None:
                        self._builder.take(said)
                self._builder.close(self._call.usage)
        except HttpError as error:
            self.error = error
            self._builder.fail(error)
        except asyncio.CancelledError:
            self._builder.cancel()
        except Exception as error:
            self.error = HttpError.of(error)
            self._builder.fail(self.error)
            raise
        finally:
            asyncio.get_running_loop().call_soon(self._news.set)  # once this task counts as done
            self._ended()

    def _tell(self, event: Event) -> None:
        if self.told:
            self.log.append(b"event: %s\ndata: %s\n\n" % (event["type"].encode(), json.encode(event)))
            self._news.set()


class RunStream:
    """The response that reads a run's events; `owned` stops the run when the reader leaves."""

    def __init__(self, run: Run, ping: float, *, after: int = -1, owned: bool) -> None:
        self.run = run
        self.ping = ping
        self.after = after
        self.owned = owned

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
            await until_gone(receive, self._send(send))
        finally:
            if self.owned:
                await self.run.stop()

    async def _send(self, send: Send) -> None:
        async for data in self.run.events(self.after, self.ping):
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
