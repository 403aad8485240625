"""The routes that say what is served and how it is: models, health, metrics, and the runs of training."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from .. import __version__
from ..core import RequestError
from .answers import json
from .client import Phase, add
from .runs import Runs

if TYPE_CHECKING:
    from .app import Api


class Status:
    """Counts and times, never content."""

    def __init__(self, api: Api) -> None:
        self.api = api
        self.runs = Runs(api.config.runs)
        self.began = time.time()

    def routes(self) -> list[BaseRoute]:
        get = ["GET"]
        return [
            Route("/v1/models", self.models, methods=get),
            Route("/v1/models/{name:path}", self.model, methods=get),
            Route("/health", self.readyz, methods=get),
            Route("/livez", self.livez, methods=get),
            Route("/readyz", self.readyz, methods=get),
            Route("/version", self.version, methods=get),
            Route("/metrics", self.prometheus, methods=get),
            Route("/stats", self.stats, methods=get),
            Route("/runs", self.list_runs, methods=get),
            Route("/runs/{name:path}", self.run_rows, methods=get),
        ]

    async def models(self, request: Request) -> Response:
        cards = [[self._card(api), *api.adapters.cards()] for api in self.api.shared.apis]
        return json({"object": "list", "data": [card for some in cards for card in some]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        api = self.api.shared.api(name)
        api.check_model(name)
        return json(api.adapters.card(name) if name in api.adapters.listed else self._card(api))

    def _card(self, api: Api) -> dict[str, Any]:
        info = api.client.info
        return {
            "id": api.config.name,
            "object": "model",
            "created": int(self.began),
            "owned_by": "twofold",
            "root": api.config.name,
            "parent": None,
            "max_model_len": info.max_len if info else None,
        }

    async def livez(self, request: Request) -> Response:
        """Whether it is worth keeping this process: not when no model could be kept running."""
        alive = any(api.client.phase is not Phase.FAILED for api in self.api.shared.apis)
        return json({"status": "alive" if alive else "failed"}, 200 if alive else 503)

    async def readyz(self, request: Request) -> Response:
        """Whether a request sent now would be worked on; a model that is out of memory is fetched for it."""
        apis = self.api.shared.apis
        some = any(api.client.ready or (len(apis) > 1 and api.client.phase is Phase.STOPPED) for api in apis)
        ready = some and not self.api.shared.draining
        phase = "draining" if self.api.shared.draining else str(self.api.client.phase)
        return json({"status": "ready" if ready else "late" if phase == "ready" else phase}, 200 if ready else 503)

    async def version(self, request: Request) -> Response:
        return json({"version": __version__})

    async def prometheus(self, request: Request) -> Response:
        return Response(self.api.shared.render_metrics(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def stats(self, request: Request) -> Response:
        """What the page's live view shows; counts and times, never content."""
        client, now, past = self.api.client, self.api.client.stats, self.api.client.past
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
                "model": self.api.config.name,
                "state": "draining" if self.api.shared.draining else "ready" if client.ready else str(client.phase),
                "uptime_seconds": round(time.time() - self.began, 1),
                "running": now.running,
                "waiting": now.waiting + sum(not a.sent for a in client.live.values()),
                "kv_cache_usage": now.blocks_used / max(total, 1),
                "kv_blocks": {"total": total, "used": now.blocks_used, "cached": now.blocks_cached},
                "prefix_cache_hit_rate": hits / max(queries, 1),
                "prompt_tokens_total": self.api.metrics.prompt_tokens,
                "generation_tokens_total": self.api.metrics.generation_tokens,
                "kv_tiers": add(past, now).tiers,
                "speculation": {
                    "drafts": past.drafts + now.drafts,
                    "draft_tokens": past.draft_tokens + now.draft_tokens,
                    "accepted_tokens": past.accepted_tokens + now.accepted_tokens,
                },
                "preemptions_total": past.preemptions + now.preemptions,
                "engine_restarts_total": client.restarts,
                "requests": rows,
            }
        )

    # -- runs of training -------------------------------------------------------------------------------------------

    async def list_runs(self, request: Request) -> Response:
        """What the training page can show: runs and their state."""
        return json({"directory": str(self.api.config.runs), "runs": await asyncio.to_thread(self.runs.listing)})

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
