"""The routes of the Responses API."""

from __future__ import annotations

import secrets
import time
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response as HttpResponse
from starlette.routing import BaseRoute, Route

from ...core import RequestError
from ..answers import json
from ..bodies import decode, renamed
from ..calls import Call
from ..errors import HttpError
from ..shape import ChatShape
from ..stream import until_gone
from .items import as_chat, given, messages
from .running import Run, RunStream
from .shapes import Format, ItemList, ReasoningConfig, Response, ResponseDeleted, ResponseRequest, TextConfig
from .store import Kept, Store

if TYPE_CHECKING:
    from ..app import Api

# What a chat calls it, and what this API does.
NAMES = {
    "prompt": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
    "verbosity": "text.verbosity",
}
MOST_ITEMS = 100


class Responses:
    def __init__(self, api: Api) -> None:
        self.api = api

    @property
    def store(self) -> Store:
        return self.api.shared.responses

    def routes(self) -> list[BaseRoute]:
        one = "/v1/responses/{name}"
        return [
            Route("/v1/responses", self.create, methods=["POST"]),
            Route(one, self.fetch, methods=["GET"]),
            Route(one, self.delete, methods=["DELETE"]),
            Route(f"{one}/cancel", self.cancel, methods=["POST"]),
            Route(f"{one}/input_items", self.input_items, methods=["GET"]),
        ]

    async def create(self, request: Request) -> Any:
        asked = decode(ResponseRequest, await request.body())
        asked.check()
        owner, before = request.scope["owner"], []
        if asked.previous_response_id is not None:
            previous = self.store.get(owner, asked.previous_response_id, "previous_response_id")
            if previous.running:
                raise RequestError("that response is still being written: wait for it", "previous_response_id")
            before = previous.next_turn()
        items = given(asked)
        before += messages(items)
        call, shape = await self._open(request, asked, before)
        kept = Kept(owner, _response(asked, call, shape.model), items, before)
        try:
            if kept.response.store:
                self.store.put(kept)
        except BaseException:
            async with call:
                raise
        run = kept.run = Run(
            call, shape, kept.response, told=bool(asked.stream), ended=lambda: self._ended(kept, bool(asked.background))
        )
        if asked.stream:
            return RunStream(run, self.api.config.ping_seconds, owned=not asked.background)
        if asked.background:
            return json(kept.response)
        try:
            return json(await until_gone(request.receive, run.finished()))
        finally:
            await run.stop()

    async def fetch(self, request: Request) -> Any:
        """The answer as it stands, or its events from number `starting_after` on."""
        kept = self._kept(request)
        if request.query_params.get("stream") != "true":
            return json(kept.response)
        if kept.run is None or not kept.run.told:
            raise RequestError("only what was created with background and stream can be streamed again", "stream")
        after = request.query_params.get("starting_after", "-1")
        if after != "-1" and not (after.isascii() and after.isdecimal() and len(after) < 10):
            raise RequestError(f"starting_after is the number of an event, not {after!r:.40}", "starting_after")
        return RunStream(kept.run, self.api.config.ping_seconds, after=int(after), owned=False)

    async def delete(self, request: Request) -> HttpResponse:
        kept = self._kept(request)
        if kept.run is not None:
            await kept.run.stop()
        self.store.delete(kept)
        return json(ResponseDeleted(kept.response.id))

    async def cancel(self, request: Request) -> HttpResponse:
        kept = self._kept(request)
        if not kept.response.background:
            raise RequestError("only a response in the background is cancelled: close the connection of this one")
        if kept.run is not None:
            await kept.run.stop()
        return json(kept.response)

    async def input_items(self, request: Request) -> HttpResponse:
        """What was sent, newest first unless `order` is asc."""
        kept, query = self._kept(request), request.query_params
        limit, order = query.get("limit", "20"), query.get("order", "desc")
        if not (limit.isascii() and limit.isdecimal() and 1 <= int(limit[:9]) <= MOST_ITEMS):
            raise RequestError(f"limit is 1 to {MOST_ITEMS}, not {limit!r:.40}", "limit")
        if order not in ("asc", "desc"):
            raise RequestError(f"order is asc or desc, not {order!r:.40}", "order")
        items = kept.items if order == "asc" else kept.items[::-1]
        if (after := query.get("after")) is not None:
            place = next((n for n, item in enumerate(items, 1) if item["id"] == after), None)
            if place is None:
                raise RequestError(f"no item {after!r:.60} in this input", "after")
            items = items[place:]
        page = items[: int(limit)]
        first, last = (page[0]["id"], page[-1]["id"]) if page else (None, None)
        return json(ItemList(page, first, last, len(page) < len(items)))

    # -- inside -----------------------------------------------------------------------------------------------------

    def _kept(self, request: Request) -> Kept:
        return self.store.get(request.scope["owner"], request.path_params["name"])

    def _ended(self, kept: Kept, background: bool) -> None:
        if not background:
            kept.run = None  # its events were for the one reader that it had
        self.store.weigh(kept)

    async def _open(self, request: Request, asked: ResponseRequest, said: list[Any]) -> tuple[Call, ChatShape]:
        """Hand the chat to the engine; with truncation "auto" its oldest messages go until it fits."""
        drop = 0
        while True:
            kept = said[drop:]
            try:
                return await self.api.open_chat(request, as_chat(asked, kept), "resp")
            except (RequestError, HttpError) as error:
                fits = getattr(error, "code", None) != "context_length_exceeded"
                if asked.truncation != "auto" or fits or len(kept) < 2:
                    if (error.param or "").startswith("messages"):
                        error.param = "input"  # which item was which message is not kept
                    raise renamed(error, NAMES) from None
                drop = max(2 * drop, 1) if 2 * drop < len(said) else len(said) - 1


def _response(asked: ResponseRequest, call: Call, model: str) -> Response:
    params = call.choices[0].request.params
    found = Response(
        id=f"resp_{secrets.token_hex(24)}",
        created_at=int(time.time()),
        model=model,
        status="queued" if asked.background else "in_progress",
        background=bool(asked.background),
        instructions=asked.instructions,
        max_output_tokens=asked.max_output_tokens,
        metadata=asked.metadata or {},
        parallel_tool_calls=asked.parallel_tool_calls is not False,
        previous_response_id=asked.previous_response_id,
        reasoning=asked.reasoning or ReasoningConfig(),
        store=asked.store is not False,
        temperature=params.temperature,
        text=asked.text or TextConfig(),
        tool_choice=asked.tool_choice or "auto",
        tools=asked.tools or [],
        top_logprobs=asked.top_logprobs or 0,
        top_p=params.top_p,
        truncation=asked.truncation or "disabled",
        user=asked.user,
        output=[],
    )
    found.text.format = found.text.format or Format(type="text")
    return found
