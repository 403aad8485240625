"""Ledger: the records of calls, those under way and the last that ended, for GET /requests and whoever listens.

Bounded twice: `limits.records` of them, none longer than `limits.record_seconds` after its end. A key sees its own.
"""

from __future__ import annotations

import difflib
import itertools
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from ..core import RequestError
from .answers import json
from .config import Limits
from .errors import HttpError
from .record import Record, RequestFacts

if TYPE_CHECKING:
    from .app import Api

NEAR = 3
STATES = ("waiting", "running", "finished")


class RequestList(msgspec.Struct):
    """Newest first."""

    data: list[RequestFacts]
    has_more: bool
    object: str = "list"


class Ledger:
    """`began` and `ended` are called with each record when the engine has it, and when it is over."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.began: list[Callable[[Record], None]] = []
        self.ended: list[Callable[[Record], None]] = []
        self._numbers = itertools.count()
        self._live: dict[Record, int] = {}
        self._done: dict[int, Record] = {}  # oldest first

    def begin(self, record: Record) -> None:
        self._live[record] = next(self._numbers)
        for tell in self.began:
            tell(record)

    def end(self, record: Record, error: BaseException | None = None) -> None:
        """A record is over; once is enough."""
        number = self._live.pop(record, None)
        if number is None:
            return
        record.end(error)
        self._keep(number, record)

    def refuse(self, record: Record, error: HttpError) -> None:
        """A call that was not accepted."""
        record.refuse(error)
        self._keep(next(self._numbers), record)

    def _keep(self, number: int, record: Record) -> None:
        self._done[number] = record
        self._prune()
        for tell in self.ended:
            tell(record)

    def of(self, owner: str) -> list[Record]:
        """An owner's records, newest first."""
        self._prune()
        found = [(number, record) for record, number in self._live.items()] + list(self._done.items())
        found.sort(key=lambda pair: pair[0], reverse=True)
        return [record for _, record in found if record.owner == owner]

    def find(self, owner: str, name: str) -> Record:
        """The newest call of that id, as a header or an answer has it (with `chatcmpl-` or the like before it).

        Raises:
            HttpError: 404 with the nearest ids that there are.
        """
        found = self.of(owner)
        for record in found:
            if name == record.id or name.endswith((f"-{record.id}", f"_{record.id}")):
                return record
        near = difflib.get_close_matches(name[:200], dict.fromkeys(record.id for record in found), NEAR, 0.4)
        hint = f"the nearest are {', '.join(near)}" if near else f"{len(found)} are kept: see /requests"
        raise HttpError(404, f"no request '{name:.80}' is known, and {hint}", param="id", code="unknown_request")

    def _prune(self) -> None:
        oldest = time.monotonic() - self.limits.record_seconds
        while self._done:
            number, record = next(iter(self._done.items()))
            if len(self._done) <= self.limits.records and (record.ended or oldest) >= oldest:
                return
            del self._done[number]


class Requests:
    """The routes."""

    def __init__(self, api: Api) -> None:
        self.api = api

    @property
    def ledger(self) -> Ledger:
        return self.api.shared.ledger

    def routes(self) -> list[BaseRoute]:
        return [
            Route("/requests", self.listing, methods=["GET"]),
            Route("/requests/{name:path}", self.one, methods=["GET"]),
        ]

    async def listing(self, request: Request) -> Response:
        asked: Any = request.query_params
        limit, state = asked.get("limit", "100"), asked.get("state")
        if not (limit.isascii() and limit.isdecimal() and len(limit) < 7 and int(limit) > 0):
            raise RequestError(f"limit is 1 or more, not {limit!r:.40}", "limit")
        if state is not None and state not in STATES:
            raise RequestError(f"state is one of {', '.join(STATES)}, not {state!r:.40}", "state")
        told = (record.told() for record in self.ledger.of(request.scope["owner"]))
        found = list(itertools.islice((one for one in told if state in (None, one.state)), int(limit) + 1))
        return json(RequestList(found[: int(limit)], len(found) > int(limit)))

    async def one(self, request: Request) -> Response:
        return json(self.ledger.find(request.scope["owner"], request.path_params["name"]).told())
