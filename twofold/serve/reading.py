"""Reading: the texts of one API call that are read whole, from ids to numbers."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from starlette.requests import Request as HttpRequest

from ..core import RequestError
from ..engine.request import Output, Request, State
from ..engine.sampling import SamplingParams
from ..engine.vectors import Pooled, Pooling
from .choice import failure
from .errors import HttpError
from .record import Read
from .stream import until_gone

if TYPE_CHECKING:
    from .app import Api

_numbers = itertools.count()
_PARAMS = SamplingParams()


class Reading:
    """Texts as (ids, types) and what is asked of them; `run` gives an answer for each, in order."""

    def __init__(
        self,
        api: Api,
        texts: Sequence[tuple[list[int], list[int]]],
        asked: Pooling,
        *,
        priority: int,
        deadline: float,
    ) -> None:
        """Raises RequestError or HttpError: this model does not do what is asked, or a text that it cannot read."""
        self.api, self.arrived = api, time.monotonic()
        abilities = api.abilities
        abilities.check(asked)
        self.requests = [
            Request(
                id=f"r{next(_numbers):x}",
                prompt_ids=tuple(ids),
                params=_PARAMS,
                pooling=asked,
                types=tuple(types) if abilities.types > 1 else (),
                priority=priority,
                deadline=deadline,
                seed=0,
            )
            for ids, types in texts
        ]
        for request in self.requests:
            try:
                api.limits.check_text(request, abilities.types)
            except RequestError as error:
                if len(request.prompt_ids) <= api.limits.max_model_len:
                    raise
                raise HttpError(400, str(error), param="input", code="context_length_exceeded") from None

    @property
    def tokens(self) -> int:
        return sum(len(request.prompt_ids) for request in self.requests)

    async def run(self, request: HttpRequest) -> list[Pooled]:
        """What became of each text; a client that leaves takes its texts out of the engine.

        Raises:
            HttpError: the queue is full, or a text came to no good end.
        """
        self.api.check_room(request, len(self.requests), self.tokens)
        found: dict[str, Pooled] = {}
        failed: list[Output] = []
        done = asyncio.Event()

        def sink(output: Output) -> None:
            if output.pooled is not None:
                found[output.request_id] = output.pooled
            elif output.finish is not None:
                failed.append(output)
            if failed or len(found) == len(self.requests):
                done.set()

        self.api.client.submit(self.requests, sink)
        lengths = [len(one.prompt_ids) for one in self.requests]
        self.api.metrics.texts(lengths)
        ledger, record = self.api.shared.ledger, self.api.record(request, None, None)
        reads = [Read(self.api.client.live[one.id].fate) for one in self.requests]
        record.submit(lengths, reads, None)
        ledger.begin(record)
        end = "abort"
        try:
            await until_gone(request.receive, done.wait())
            if failed:
                end = "abort" if failed[0].finish is State.ABORT else "error"
                raise failure(failed[0])
            end = "stop"
            for read in reads:
                read.finish = "stop"
        except BaseException as error:
            ledger.end(record, error)
            raise
        else:
            ledger.end(record)
        finally:
            names = [one.id for one in self.requests]
            self.api.client.abort([name for name in names if name not in found])
            self.api.metrics.texts_ended(names, end, self.arrived)
        return [found[one.id] for one in self.requests]
