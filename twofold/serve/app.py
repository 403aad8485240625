"""The routes: each validates, turns text into ids, hands sequences to the engine, and shapes what comes back.

body ──▶ openai (checked) ──▶ texts (ids) ──▶ Call ──▶ EngineClient ──▶ shape ──▶ answer or events
"""

from __future__ import annotations

import asyncio
import math
import time
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route, Router

from .. import __version__
from ..core import CapacityError, RequestError
from ..engine.defaults import sampling_defaults
from ..engine.limits import Limits
from ..engine.sampling import SamplingParams
from . import openai
from .answers import encode
from .calls import Call
from .client import EngineClient, Phase
from .config import ServeConfig
from .errors import HttpError
from .guard import App, Guard, Receive, Scope, Send
from .metrics import Metrics
from .pages import Pages
from .runs import Runs
from .shape import ChatShape, TextShape
from .stream import EventStream, whole
from .texts import Texts

LONGEST_SECONDS = 24 * 3600.0


class Api:
    """What the routes share. `draining` is set by the server when it is told to leave."""

    def __init__(self, config: ServeConfig, client: EngineClient, texts: Texts) -> None:
        self.config = config
        self.client = client
        self.texts = texts
        self.metrics = Metrics(config, client)
        self.runs = Runs(config.runs)
        self.draining = False
        self.began = time.time()
        self.defaults = sampling_defaults(config.model) if config.generation_config else {}

    def routes(self) -> list[BaseRoute]:
        get, post = ["GET"], ["POST"]
        routes: list[BaseRoute] = [
            Route("/v1/models", self.models, methods=get),
            Route("/v1/models/{name:path}", self.model, methods=get),
            Route("/v1/completions", self.completions, methods=post),
            Route("/v1/chat/completions", self.chat_completions, methods=post),
            Route("/tokenize", self.tokenize, methods=post),
            Route("/detokenize", self.detokenize, methods=post),
            Route("/health", self.readyz, methods=get),
            Route("/livez", self.livez, methods=get),
            Route("/readyz", self.readyz, methods=get),
            Route("/version", self.version, methods=get),
            Route("/metrics", self.prometheus, methods=get),
            Route("/stats", self.stats, methods=get),
            Route("/runs", self.list_runs, methods=get),
            Route("/runs/{name:path}", self.run_rows, methods=get),
        ]
        if self.config.enable_ui:
            routes += Pages().routes()
        return routes

    # -- generation -------------------------------------------------------------------------------------------------

    async def completions(self, request: Request) -> Any:
        body = openai.decode(openai.CompletionRequest, await request.body())
        body.check()
        self._check_model(body.model)
        params, prompts = body.params(self.defaults), body.prompts(self.config.limits.prompts)
        self._check_room(len(prompts) * params.n)
        found = await self.texts.prompts(prompts, special=body.add_special_tokens is not False)
        ids = [truncate(each, body, self._limits, params) for each in found]
        shape = TextShape(**self._shape("cmpl", request, body), logprobs=body.logprobs)
        if body.echo:
            shape.echo = [self._echo(p, i) if body.truncate_prompt_tokens is None else self._echo(i, i)
                          for p, i in zip(prompts, ids)]  # fmt: skip
            shape.scores_only = body.scores_only
        return await self._answer(request, body, shape, ids, params)

    async def chat_completions(self, request: Request) -> Any:
        body = openai.decode(openai.ChatRequest, await request.body())
        body.check()
        self._check_model(body.model)
        params, messages = body.params(self.defaults), openai.plain(body.messages, self.config.limits.messages)
        self._check_room(params.n)
        ids = await self.texts.chat(
            messages,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            settings=body.chat_template_kwargs,
        )
        shape = ChatShape(**self._shape("chatcmpl", request, body), logprobs=params.logprobs)
        return await self._answer(request, body, shape, [truncate(ids, body, self._limits, params)], params)

    async def _answer(
        self,
        request: Request,
        body: openai.Common,
        shape: TextShape | ChatShape,
        prompts: list[list[int]],
        params: SamplingParams,
    ) -> Any:
        call = Call(self.client, self.metrics, self.texts.tokenizer)
        deadline, salt = self._deadline(request), f"{request.scope['owner']}:{body.cache_salt or ''}".strip(":")
        for ids in prompts:
            call.add(ids, params, self._limits, priority=body.priority or 0, deadline=deadline, salt=salt)
        self._check_room(len(call.choices), sum(map(len, prompts)) * params.n)
        call.submit()
        if body.stream:
            return EventStream(call, shape, self.config.ping_seconds)
        return json(await whole(request, call, shape))

    def _shape(self, prefix: str, request: Request, body: openai.Common) -> dict[str, Any]:
        options = body.stream_options or openai.StreamOptions()
        return {
            "id": f"{prefix}-{body.request_id or request.scope['request_id']}",
            "model": self.config.name,
            "tokenizer": self.texts.tokenizer,
            "prompt_logprobs": body.prompt_logprobs,
            "token_ids": bool(body.return_token_ids),
            "as_ids": bool(body.return_tokens_as_token_ids),
            "usage_in_stream": bool(options.include_usage or options.continuous_usage_stats),
            "usage_in_every": bool(options.continuous_usage_stats),
        }

    def _echo(self, prompt: str | list[int], ids: list[int]) -> str:
        return prompt if isinstance(prompt, str) else self.texts.tokenizer.decode(ids, skip_special_tokens=True)

    def _check_model(self, name: str | None) -> None:
        if name not in (None, "", self.config.name):
            raise HttpError(
                404,
                f"no model '{name:.80}' here, only '{self.config.name}': see /v1/models",
                param="model",
                code="model_not_found",
            )

    def _check_room(self, count: int, tokens: int = 0) -> None:
        try:
            self.client.check(count, tokens)
        except CapacityError as error:
            self.metrics.rejected()
            raise HttpError(429, str(error), code="queue_full", retry_after=self.client.retry_after) from None

    @property
    def _limits(self) -> Limits:
        info = self.client.info
        if info is None:
            raise HttpError(503, "the model is still loading: try again soon", code="loading", retry_after=2)
        return Limits(max_model_len=info.max_len, vocab=info.vocab_size, cache_tokens=info.blocks * info.block_size)

    def _deadline(self, request: Request) -> float:
        seconds = self.config.request_seconds
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

    # -- text -------------------------------------------------------------------------------------------------------

    async def tokenize(self, request: Request) -> Response:
        body = openai.decode(openai.TokenizeRequest, await request.body())
        self._check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise RequestError("send prompt or messages, and not both", "prompt")
        if body.prompt is not None:
            (ids,) = await self.texts.prompts([body.prompt], special=body.add_special_tokens is not False)
        else:
            messages = openai.plain(body.messages or [], self.config.limits.messages)
            ids = await self.texts.chat(
                messages,
                add_generation_prompt=body.add_generation_prompt,
                continue_final_message=body.continue_final_message,
                settings=body.chat_template_kwargs,
            )
        strings = [self.texts.tokenizer.token(i) for i in ids] if body.return_token_strs else None
        return json({"count": len(ids), "max_model_len": self._limits.max_model_len, "tokens": ids,
                     "token_strs": strings})  # fmt: skip

    async def detokenize(self, request: Request) -> Response:
        body = openai.decode(openai.DetokenizeRequest, await request.body())
        self._check_model(body.model)
        wrong = [i for i in body.tokens if not 0 <= i < self._limits.vocab]
        if wrong:
            raise RequestError(f"token id {wrong[0]} is outside the vocabulary of {self._limits.vocab}", "tokens")
        text = await self.texts.off_loop(
            4 * len(body.tokens), lambda: self.texts.tokenizer.decode(body.tokens, skip_special_tokens=False)
        )
        return json({"prompt": text})

    # -- what is served, and how it is ------------------------------------------------------------------------------

    async def models(self, request: Request) -> Response:
        return json({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        self._check_model(request.path_params["name"])
        return json(self._card())

    def _card(self) -> dict[str, Any]:
        info = self.client.info
        return {
            "id": self.config.name,
            "object": "model",
            "created": int(self.began),
            "owned_by": "twofold",
            "root": self.config.name,
            "parent": None,
            "max_model_len": info.max_len if info else None,
        }

    async def livez(self, request: Request) -> Response:
        """Whether it is worth keeping this process: not when the model could not be kept running."""
        alive = self.client.phase is not Phase.FAILED
        return json({"status": "alive" if alive else "failed"}, 200 if alive else 503)

    async def readyz(self, request: Request) -> Response:
        """Whether a request sent now would be worked on."""
        ready = self.client.ready and not self.draining
        phase = "draining" if self.draining else str(self.client.phase)
        return json({"status": "ready" if ready else "late" if phase == "ready" else phase}, 200 if ready else 503)

    async def version(self, request: Request) -> Response:
        return json({"version": __version__})

    async def prometheus(self, request: Request) -> Response:
        return Response(self.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def stats(self, request: Request) -> Response:
        """What the page's live view shows; counts and times, never content."""
        client, now, past = self.client, self.client.stats, self.client.past
        total = now.blocks or (client.info.blocks if client.info else 0)
        queries, hits = past.prefix_queries + now.prefix_queries, past.prefix_hits + now.prefix_hits
        rows = [
            {
                "id": a.request.id,
                "state": "running" if a.started is not None and a.sent else "waiting",
                "prompt_tokens": len(a.request.prompt_ids),
                "output_tokens": len(a.request.output_ids),
                "seconds": round(time.monotonic() - a.request.arrival, 3),
            }
            for a in list(client.live.values())[:200]
        ]
        return json(
            {
                "model": self.config.name,
                "state": "draining" if self.draining else "ready" if client.ready else str(client.phase),
                "uptime_seconds": round(time.time() - self.began, 1),
                "running": now.running,
                "waiting": now.waiting + sum(not a.sent for a in client.live.values()),
                "kv_cache_usage": now.blocks_used / max(total, 1),
                "kv_blocks": {"total": total, "used": now.blocks_used, "cached": now.blocks_cached},
                "prefix_cache_hit_rate": hits / max(queries, 1),
                "prompt_tokens_total": self.metrics.prompt_tokens,
                "generation_tokens_total": self.metrics.generation_tokens,
                "preemptions_total": past.preemptions + now.preemptions,
                "engine_restarts_total": client.restarts,
                "requests": rows,
            }
        )

    # -- runs of training -------------------------------------------------------------------------------------------

    async def list_runs(self, request: Request) -> Response:
        """What the training page can show: runs and their state."""
        return json({"directory": str(self.config.runs), "runs": await asyncio.to_thread(self.runs.listing)})

    async def run_rows(self, request: Request) -> Response:
        """One run's rows from `from` on, or all of row `row`; `version` is that of the rows which the asker has."""
        asked = request.query_params
        which = "row" if "row" in asked else "from"
        given, version, name = asked.get(which, "0"), asked.get("version"), request.path_params["name"]
        if not (given.isascii() and given.isdecimal() and len(given) < 16):
            raise RequestError(f"{which} is the number of a row, 0 or more, not {given!r:.40}", which)
        if which == "row":
            return json(await asyncio.to_thread(self.runs.row, name, int(given), version or ""))
        return json(await asyncio.to_thread(self.runs.rows, name, int(given), version))


def truncate(ids: list[int], body: openai.Common, limits: Limits, params: SamplingParams) -> list[int]:
    """`truncate_prompt_tokens`: keep the last so many (or the first, with truncation_side "right"); -1: what fits."""
    most = body.truncate_prompt_tokens
    if most is None:
        return ids
    if most == -1:
        most = max(limits.max_model_len - (params.max_tokens or 1), 1)
    return ids[:most] if body.truncation_side == "right" else ids[-most:]


def json(answer: Any, status: int = 200) -> Response:
    return Response(encode(answer), status, media_type="application/json")


def build_app(api: Api) -> App:
    """The whole ASGI application, the guard outermost."""
    router = Router(api.routes(), redirect_slashes=False, default=_not_found)

    async def routed(scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = api  # makes Starlette raise its 404 and 405 instead of answering in plain text
        await router(scope, receive, send)

    return Guard(routed, api.config, lambda: api.draining)


async def _not_found(scope: Scope, receive: Receive, send: Send) -> None:
    raise HttpError(404, f"no route {scope['path']!r:.100}: see the README for the list", code="unknown_route")
