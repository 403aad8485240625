"""History: what one model's server did lately, a row every few seconds, so that a page opened now shows the past.

Rows are counted from the start of the server and kept for half an hour; each has what happened since the row before
(`seconds` long). Counts and times alone.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from ..core import RequestError
from .answers import json
from .client import EngineClient, add
from .metrics import Metrics

if TYPE_CHECKING:
    from .app import Api

EVERY = 3.0
KEPT = 600  # half an hour
GLANCES = 12  # at the gauges, for each row


class Moment(msgspec.Struct, kw_only=True):
    """One row: since the row before it, the highest that gauges were until `time` (Unix), counts, percentiles (None:
    nothing came). Latencies in seconds, `kv_usage` a share."""

    time: float
    seconds: float
    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    adapters: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    finished: int = 0
    rejected: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    restarts: int = 0
    first_p50: float | None = None
    first_p95: float | None = None
    between_p50: float | None = None
    between_p95: float | None = None


class HistoryRows(msgspec.Struct):
    """Rows `from` and on; row numbers begin anew when `began`, the start of the server, is another."""

    model: str
    models: list[str]
    began: float
    every: float
    state: str
    first: int = msgspec.field(name="from")
    rows: list[Moment] = []


COUNTS = ("prefix_queries", "prefix_hits", "preemptions", "draft_tokens", "accepted_tokens")


class History:
    """`look` makes a row; `start` has it done every `every` seconds."""

    def __init__(self, client: EngineClient, metrics: Metrics, every: float = EVERY) -> None:
        self.every = every
        self.began = time.time()
        self.rows: deque[Moment] = deque(maxlen=KEPT)
        self.made = 0
        self._client = client
        self._metrics = metrics
        self._most: dict[str, Any] = {"running": 0, "waiting": 0, "kv_usage": 0.0, "adapters": 0}
        self._last = time.monotonic()
        self._before = self._counters()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="history")

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def since(self, number: int) -> tuple[int, list[Moment]]:
        """Rows `number` and on, as far as they are kept, and the number of the first of them."""
        first = self.made - len(self.rows)
        number = min(max(number, first), self.made)
        return number, list(self.rows)[number - first :]

    def glance(self) -> None:
        """See how high the gauges are."""
        client, stats = self._client, self._client.stats
        blocks = stats.blocks or (client.info.blocks if client.info else 0)
        found = {
            "running": stats.running,
            "waiting": stats.waiting + sum(not one.sent for one in client.live.values()),
            "kv_usage": round(stats.blocks_used / max(blocks, 1), 4),
            "adapters": len(stats.adapters_running),
        }
        self._most = {name: max(value, self._most[name]) for name, value in found.items()}

    def look(self) -> None:
        """Make a row."""
        self.glance()
        now, counters = time.monotonic(), self._counters()
        first, between = self._metrics.first_tokens, self._metrics.between_tokens
        self.rows.append(
            Moment(
                time=round(time.time(), 3),
                seconds=round(now - self._last, 3),
                **self._most,
                **{name: max(count - self._before[name], 0) for name, count in counters.items()},
                first_p50=percentile(first, 0.5),
                first_p95=percentile(first, 0.95),
                between_p50=percentile(between, 0.5),
                between_p95=percentile(between, 0.95),
            )
        )
        first.clear()
        between.clear()
        self.made += 1
        self._most = dict.fromkeys(self._most, 0)
        self._last, self._before = now, counters

    def _counters(self) -> dict[str, int]:
        both, metrics = add(self._client.past, self._client.stats), self._metrics
        return {
            "prompt_tokens": metrics.prompt_tokens,
            "generation_tokens": metrics.generation_tokens,
            "finished": metrics.sequences,
            "rejected": metrics.rejections,
            "restarts": self._client.restarts,
            **{name: getattr(both, name) for name in COUNTS},
        }

    async def _run(self) -> None:
        while True:
            for _ in range(GLANCES):
                await asyncio.sleep(self.every / GLANCES)
                self.glance()
            self.look()


def percentile(values: Iterable[float], share: float) -> float | None:
    """The least value that `share` of them do not exceed; None of none."""
    found = sorted(values)
    return round(found[min(int(share * len(found)), len(found) - 1)], 6) if found else None


class Histories:
    """The route."""

    def __init__(self, api: Api) -> None:
        self.api = api

    def routes(self) -> list[BaseRoute]:
        return [Route("/history", self.get, methods=["GET"])]

    async def get(self, request: Request) -> Response:
        """The rows of the model named, from a number on."""
        given, api = request.query_params.get("from", "0"), self.api
        if not (given.isascii() and given.isdecimal() and len(given) < 16):
            raise RequestError(f"from is the number of a row, 0 or more, not {given!r:.40}", "from")
        history, shared = api.history, api.shared
        first, rows = history.since(int(given))
        names = [one.config.name for one in shared.apis]
        state = "draining" if shared.draining else "ready" if api.client.ready else str(api.client.phase)
        return json(HistoryRows(api.config.name, names, history.began, history.every, state, first, rows))
