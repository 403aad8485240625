"""The routes of the Messages API. Errors are in Anthropic's shape on every path below /v1/messages (errors.py)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from msgspec import json as msgjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from ...core import RequestError
from ..answers import json
from ..bodies import decode, renamed
from ..calls import Call
from ..errors import HttpError
from ..guard import Receive, Scope, Send
from ..messages import plain
from ..said import spoken
from ..shape import ChatShape
from ..stream import HEADERS, until_gone
from .blocks import as_chat
from .events import Blocks, Event
from .shapes import Answer, Count, CountRequest, MessagesRequest, MessagesUsage

if TYPE_CHECKING:
    from ..app import Api

NAMES = {"stop": "stop_sequences", "response_format.json_schema": "output_format", "response_format": "output_format"}


class Messages:
    def __init__(self, api: Api) -> None:
        self.api = api

    def routes(self) -> list[BaseRoute]:
        return [
            Route("/v1/messages", self.create, methods=["POST"]),
            Route("/v1/messages/count_tokens", self.count, methods=["POST"]),
        ]

    async def create(self, request: Request) -> Any:
        asked = decode(MessagesRequest, await request.body())
        asked.check()
        try:
            call, shape = await self.api.open_chat(request, as_chat(asked), "msg")
        except (RequestError, HttpError) as error:
            raise renamed(error, NAMES) from None
        answer = Answer(shape.id.replace("-", "_"), shape.model, MessagesUsage(len(call.prompts[0]), 0), [])
        if asked.stream:
            return MessageStream(call, shape, answer, self.api.config.ping_seconds)
        blocks = Blocks(answer, lambda event: None)
        async with call:
            await until_gone(request.receive, _listen(call, shape, blocks))
        return json(answer)

    async def count(self, request: Request) -> Response:
        asked = decode(CountRequest, await request.body())
        asked.check()
        body = as_chat(asked)
        body.check()
        self.api.check_model(body.model)
        ids = await self.api.chat_ids(body, plain(body.messages, self.api.config.limits.messages))
        return json(Count(len(ids)))


async def _listen(call: Call, shape: ChatShape, blocks: Blocks) -> None:
    async for said in spoken(call, shape):
        if said is not None:
            blocks.take(said)
    blocks.close(call.usage)


class MessageStream:
    """The response that sends a message event by event, with Anthropic's ping after silence."""

    def __init__(self, call: Call, shape: ChatShape, answer: Answer, ping: float) -> None:
        self.call = call
        self.shape = shape
        self.ping = ping
        self._told: list[bytes] = []
        self._blocks = Blocks(answer, self._tell)

    def _tell(self, event: Event) -> None:
        self._told.append(b"event: %s\ndata: %s\n\n" % (event["type"].encode(), msgjson.encode(event)))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self.call:
            await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
            await until_gone(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        try:
            async for data in self._events():
                await send({"type": "http.response.body", "body": data, "more_body": True})
        except HttpError as error:
            data = b"event: error\ndata: " + error.body(anthropic=True) + b"\n\n"
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self) -> AsyncIterator[bytes]:
        self._blocks.opening()
        self._tell({"type": "ping"})
        yield self._taken()
        async for said in spoken(self.call, self.shape, self.ping):
            if said is None:
                self._tell({"type": "ping"})
            else:
                self._blocks.take(said)
            if self._told:
                yield self._taken()
        self._blocks.close(self.call.usage)
        yield self._taken()

    def _taken(self) -> bytes:
        data = b"".join(self._told)
        self._told.clear()
        return data
