"""The routes: each validates, turns text into ids, hands sequences to the engine, and shapes what comes back.

body ──▶ openai (checked) ──▶ texts (ids) ──▶ Call ──▶ EngineClient ──▶ shape ──▶ answer or events
"""

from __future__ import annotations

import math
import time
from typing import Any, Protocol

from starlette.requests import Request
from starlette.routing import BaseRoute, Route, Router

from ..core import CapacityError, RequestError
from ..data import Tokenizer
from ..engine.defaults import sampling_defaults
from ..engine.grammar import messages as m
from ..engine.grammar.messages import opening
from ..engine.limits import Limits
from ..engine.sampling import SamplingParams
from ..engine.vectors import Abilities
from ..engine.words import ban
from . import openai
from .adapters import Adapters
from .answers import json
from .anthropic import Messages
from .batches import Batches
from .bodies import decode
from .calls import Call
from .client import EngineClient
from .config import ServeConfig
from .enforced import enforce
from .errors import HttpError
from .fleet import Fleet
from .forms import Forms
from .generate import Generate
from .guard import App, Guard, Receive, Scope, Send
from .hearing import Hearing
from .history import Histories, History
from .judge import Judge
from .ledger import Requests
from .messages import plain
from .metrics import Metrics
from .openapi import OpenApi
from .pages import Pages
from .readings import Readings
from .record import Record
from .reload import Reloads
from .responses import Responses
from .shape import ChatShape, TextShape
from .shared import Shared
from .status import Status
from .stream import EventStream, whole
from .switch import Switch
from .texts import Texts
from .tokens import Tokens
from .wire import Ready

LONGEST_SECONDS = 24 * 3600.0


class Asked(Protocol):
    """What every body that generates says of its sequences."""

    model: str | None
    priority: int | None
    cache_salt: str | None
    timings: bool | None
    request_id: str | None


class Api:
    """What the routes of one model share; `shared` is what it has in common with the server's other models."""

    def __init__(self, config: ServeConfig, client: EngineClient, texts: Texts, shared: Shared | None = None) -> None:
        self.config = config
        self.client = client
        self.texts = texts
        self.metrics = Metrics(config, client)
        self.history = History(client, self.metrics)
        self.adapters = Adapters(self)
        self.judge = Judge(self._opening)
        self.shared = shared or Shared(config)
        self.shared.apis.append(self)
        self.defaults = sampling_defaults(config.model) if config.generation_config else {}

    def routes(self) -> list[BaseRoute]:
        routes: list[BaseRoute] = [
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat_completions, methods=["POST"]),
            *Responses(self).routes(),
            *Messages(self).routes(),
            *Generate(self).routes(),
            *self.adapters.routes(),
            *Batches(self).routes(),
            *Reloads(self).routes(),
            *Tokens(self).routes(),
            *Readings(self).routes(),
            *Status(self).routes(),
            *Requests(self).routes(),
            *Histories(self).routes(),
        ]
        if self.config.enable_ui:
            routes += Pages().routes()
        return [*routes, *OpenApi(routes).routes()]

    # -- generation -------------------------------------------------------------------------------------------------

    async def completions(self, request: Request) -> Any:
        body = decode(openai.CompletionRequest, await request.body())
        body.check()
        self.check_model(body.model)
        params, prompts = body.params(self.defaults), body.prompts(self.config.limits.prompts)
        self.check_room(request, len(prompts) * params.width)
        await self.check_form(request, body, params)
        found = await self.texts.prompts(prompts, special=body.add_special_tokens is not False)
        ids = [truncate(each, body, self.limits, params) for each in found]
        shape = TextShape(**self._shape("cmpl", request, body), logprobs=body.logprobs)
        if body.echo:
            shape.echo = [self._echo(p, i) if body.truncate_prompt_tokens is None else self._echo(i, i)
                          for p, i in zip(prompts, ids)]  # fmt: skip
            shape.scores_only = body.scores_only
        return await self._answer(request, body, self._submit(request, body, ids, params), shape)

    async def chat_completions(self, request: Request) -> Any:
        body = decode(openai.ChatRequest, await request.body())
        return await self._answer(request, body, *await self.open_chat(request, body))

    async def open_chat(
        self, request: Request, body: openai.ChatRequest, prefix: str = "chatcmpl"
    ) -> tuple[Call, ChatShape]:
        """A chat handed to the engine: what every API that chats begins with. Use the call as a context at once."""
        body.check()
        self.check_model(body.model)
        params, messages = body.params(self.defaults), plain(body.messages, self.config.limits.messages)
        self.check_room(request, params.width)
        await self.check_form(request, body, params)
        ids = await self.chat_ids(body, messages)
        hearing = self.texts.hearing(
            body.wanted_tools(),
            ids,
            continued=messages[-1]["content"] if body.continue_final_message else None,
            silent=body.include_reasoning is False,
        )
        if hearing is not None:
            began = time.monotonic()
            params, hearing = await enforce(self.judge, hearing, params)
            request.scope["grammar_seconds"] = request.scope.get("grammar_seconds", 0.0) + time.monotonic() - began
        shape = ChatShape(**self._shape(prefix, request, body), logprobs=params.logprobs)
        return self._submit(request, body, [truncate(ids, body, self.limits, params)], params, hearing), shape

    async def chat_ids(self, body: openai.ChatRequest, messages: list[dict[str, Any]]) -> list[int]:
        return await self.texts.chat(
            messages,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            settings=body.chat_template_kwargs,
            tools=body.wanted_tools(),
            effort=body.reasoning_effort,
        )

    def _submit(
        self,
        request: Request,
        body: openai.Common,
        prompts: list[list[int]],
        params: SamplingParams,
        hearing: Hearing | None = None,
    ) -> Call:
        params, tokenizer = ban(params, self.texts.tokenizer), self.texts.tokenizer
        return self.call(request, body, prompts, params, tokenizer, hearing)

    def call(
        self,
        request: Request,
        body: Asked,
        prompts: list[list[int]],
        params: SamplingParams,
        tokenizer: Tokenizer | None,
        hearing: Hearing | None = None,
    ) -> Call:
        """Prompts handed to the engine, with all that the request says of them. Use the call as a context at once."""
        self.check_room(request, len(prompts) * params.width, sum(map(len, prompts)) * params.width)
        record = self.record(request, body.request_id, body.model)
        timed = self.config.timings if body.timings is None else body.timings
        ledger = self.shared.ledger
        call = Call(
            self.client, self.metrics, tokenizer, hearing, self.judge, record=record, ledger=ledger, timed=timed
        )
        adapter = self.check_model(body.model)  # again: it may have gone while the prompt was made ready
        deadline, salt = self.deadline(request), salted(request, body.cache_salt)
        priority = (body.priority or 0) + int(request.scope.get("priority", 0))
        for ids in prompts:
            call.add(ids, params, self.limits, priority=priority, deadline=deadline, salt=salt, adapter=adapter)
        record.stream = bool(getattr(body, "stream", False))
        call.submit()
        return call

    async def _answer(self, request: Request, body: openai.Common, call: Call, shape: TextShape | ChatShape) -> Any:
        if body.stream:
            return EventStream(call, shape, self.config.ping_seconds)
        return json(await whole(request, call, shape))

    def _shape(self, prefix: str, request: Request, body: openai.Common) -> dict[str, Any]:
        options = body.stream_options or openai.StreamOptions()
        return {
            "id": f"{prefix}-{body.request_id or request.scope['request_id']}",
            "model": body.model or self.config.name,
            "tokenizer": self.texts.tokenizer,
            "prompt_logprobs": body.prompt_logprobs,
            "token_ids": bool(body.return_token_ids),
            "as_ids": bool(body.return_tokens_as_token_ids),
            "usage_in_stream": bool(options.include_usage or options.continuous_usage_stats or body.timings),
            "usage_in_every": bool(options.continuous_usage_stats),
        }

    def _echo(self, prompt: str | list[int], ids: list[int]) -> str:
        return prompt if isinstance(prompt, str) else self.texts.tokenizer.decode(ids, skip_special_tokens=True)

    def knows(self, name: str) -> bool:
        """Whether requests for this name are for this model, or an adapter of it."""
        return name == self.config.name or name in self.adapters.listed

    def check_model(self, name: str | None) -> str:
        """The key of the adapter that a request's `model` names, "" for the model itself; HttpError 404 for neither."""
        if not name or name == self.config.name:
            return ""
        if name not in self.adapters.listed:
            known = "', '".join(api.config.name for api in self.shared.apis)
            message = f"no model '{name:.80}' here, only '{known}' and adapters: see /v1/models"
            raise HttpError(404, message, param="model", code="model_not_found")
        return self.adapters.listed[name].key

    def record(self, request: Request, name: str | None, model: str | None) -> Record:
        """A new record of a call to the model, or to an adapter of it."""
        adapter = model if model and model != self.config.name else None
        return Record(request, self.config.name, name=name, adapter=adapter)

    def check_room(self, request: Request, count: int, tokens: int = 0) -> None:
        try:
            self.client.check(count, tokens)
        except CapacityError as error:
            self.metrics.rejected()
            full = HttpError(429, str(error), code="queue_full", retry_after=self.client.retry_after)
            self.shared.ledger.refuse(self.record(request, None, None), full)
            raise full from None

    async def check_form(self, request: Request, body: Forms, params: SamplingParams) -> None:
        """Whether the form that the answer must have can be enforced; RequestError naming the field if not."""
        if params.structured_outputs is not None:
            began = time.monotonic()
            try:
                await self.judge.check(params.structured_outputs)
            except RequestError as error:
                raise RequestError(str(error), body.field(error.param)) from None
            finally:
                request.scope["grammar_seconds"] = time.monotonic() - began

    def _opening(self) -> m.Open:
        return opening(self.config.model, self.limits.vocab, self.texts.eos_ids)

    @property
    def abilities(self) -> Abilities:
        return self._info.abilities

    @property
    def _info(self) -> Ready:
        if self.client.info is None:
            raise HttpError(503, "the model is still loading: try again soon", code="loading", retry_after=2)
        return self.client.info

    @property
    def limits(self) -> Limits:
        info = self._info
        return Limits(
            max_model_len=info.max_len,
            vocab=info.vocab_size,
            cache_tokens=info.blocks * info.block_size,
            block_size=info.block_size,
            max_seqs=info.max_running,
        )

    def deadline(self, request: Request) -> float:
        seconds = float(request.scope.get("seconds", self.config.request_seconds))
        given = request.headers.get("x-request-timeout")
        if given is not None:
            try:
                wanted = float(given)
            except ValueError:
                wanted = math.nan
            if not 0 < wanted <= LONGEST_SECONDS:
                raise RequestError(f"X-Request-Timeout is seconds above 0, not {given!r:.40}", "X-Request-Timeout")
            seconds = min(seconds, wanted)
        return time.monotonic() + seconds


def salted(request: Request, salt: str | None) -> str:
    """What keeps the cached prefixes of owners, and of salts within one, apart."""
    return f"{request.scope['owner']}:{salt or ''}".strip(":")


def truncate(ids: list[int], body: openai.Common, limits: Limits, params: SamplingParams) -> list[int]:
    """`truncate_prompt_tokens`: keep the last so many (or the first, with truncation_side "right"); -1: what fits."""
    most = body.truncate_prompt_tokens
    if most is None:
        return ids
    if most == -1:
        most = max(limits.max_model_len - (params.max_tokens or 1), 1)
    return ids[:most] if body.truncation_side == "right" else ids[-most:]


def routed(api: Api) -> App:
    """One model's routes."""
    router = Router(api.routes(), redirect_slashes=False, default=_not_found)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = api  # makes Starlette raise its 404 and 405 instead of answering in plain text
        await router(scope, receive, send)

    return app


def build_app(api: Api, fleet: Fleet | None = None) -> App:
    """The whole ASGI application, the guard outermost; with a `fleet` a request's model chooses among its members."""
    api.shared.app = routed(api) if fleet is None else Switch(fleet)
    guard = Guard(api.shared.app, api.config, lambda: api.shared.draining)
    api.shared.reload.told.append(guard.renew)
    return guard


async def _not_found(scope: Scope, receive: Receive, send: Send) -> None:
    raise HttpError(404, f"no route {scope['path']!r:.100}: see the README for the list", code="unknown_route")
