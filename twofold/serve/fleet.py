"""Fleet: several models behind one server, and which of them are in memory.

    out ──use──▶ loading ──▶ resident ──idle for long, or another needs the room──▶ out
                   │ fails
                   ▼ 503 for this one alone, tried again after a while

Whoever is in use is never swapped out. A model that waits for room takes that of the one that was used longest ago;
when all are in use it waits, and after a while the one that has been in the longest takes no new requests until those
that it has are done: so nobody waits for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..core import CapacityError, TwofoldError
from .client import EngineClient, Phase
from .config import ServeConfig
from .errors import HttpError
from .guard import App

if TYPE_CHECKING:
    from .app import Api

log = logging.getLogger("twofold.serve")

PATIENCE = 5.0  # of one that waits for room, before it is made
AGAIN = 30.0  # seconds until a model that could not be loaded is tried again


class Member:
    """One model: its routes, who uses it, and since when."""

    def __init__(self, api: Api, app: App) -> None:
        self.api = api
        self.app = app
        self.users = 0
        self.used = 0.0
        self.since = 0.0
        self.leaving = False
        self.failed: tuple[float, str] | None = None
        self.loading: asyncio.Task[None] | None = None

    @property
    def client(self) -> EngineClient:
        return self.api.client

    @property
    def resident(self) -> bool:
        """Whether its process is there, or being started again after a death."""
        return self.client.phase in (Phase.READY, Phase.RESTARTING)

    @property
    def busy(self) -> bool:
        return bool(self.users or self.client.live)


class Hold:
    """One use of a member: nothing until `take`, which waits for the model; `release` always."""

    def __init__(self, fleet: Fleet, member: Member) -> None:
        self._fleet = fleet
        self._member = member
        self._held = False

    async def take(self) -> None:
        """Wait until the model is in memory.

        Raises:
            HttpError: 503, it cannot be loaded.
        """
        member = self._member
        while not member.resident or member.leaving:
            claimed = int(not member.resident)  # so that it is not swapped out again before it was used
            member.users += claimed
            try:
                await self._fleet.bring(member)
            finally:
                member.users -= claimed
        member.users += 1
        self._held = True

    def release(self) -> None:
        if self._held:
            self._held = False
            self._member.users -= 1
            self._member.used = time.monotonic()


class Fleet:
    """All models of a server; the first is brought in at the start."""

    def __init__(self, members: Sequence[Member], config: ServeConfig) -> None:
        self.members = members
        self.config = config
        self._turn = asyncio.Lock()  # who loads or unloads
        self._sweeper: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._load(self.members[0])
        if self.config.idle_seconds is not None:
            self._sweeper = asyncio.create_task(self._sweep(self.config.idle_seconds), name="idle-models")

    async def stop(self) -> None:
        tasks = [task for task in (self._sweeper, *(m.loading for m in self.members)) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def member(self, api: Api) -> Member:
        return next(member for member in self.members if member.api is api)

    async def bring(self, member: Member) -> None:
        """Wait for a turn of loading this model; HttpError 503 when it cannot be."""
        await asyncio.shield(self._load(member))

    def _load(self, member: Member) -> asyncio.Task[None]:
        """The one task that loads this model, whoever of those who wait for it leaves."""
        if member.loading is None or member.loading.done():
            member.loading = asyncio.create_task(self._bring_in(member), name=f"load-{member.api.config.name}")
            member.loading.add_done_callback(lambda task: task.cancelled() or task.exception())
        return member.loading

    async def _bring_in(self, member: Member) -> None:
        async with self._turn:
            if member.resident:
                return
            if member.failed is not None and time.monotonic() - member.failed[0] < AGAIN:
                raise self._refusal(member)
            while self._full():
                await self._make_room(member)
            began = time.monotonic()
            while not await self._try(member):
                await self._make_room(member)
            member.since = member.used = time.monotonic()
            log.info("%s is in memory after %.1f s", member.api.config.name, member.since - began)

    async def _try(self, member: Member) -> bool:
        """Start the model; False when it does not fit beside those that are in memory."""
        client = member.client
        client.start()
        try:
            await client.first_ready
        except TwofoldError as error:
            await client.stop()
            if isinstance(error, CapacityError) and any(other.resident for other in self.members):
                return False
            member.failed = time.monotonic(), str(error)
            log.error("%s cannot be loaded: %s", member.api.config.name, error)
            raise self._refusal(member) from None
        member.failed = None
        return True

    def _refusal(self, member: Member) -> HttpError:
        when, why = member.failed or (0.0, "")
        left = max(int(when + AGAIN - time.monotonic()) + 1, 1)
        return HttpError(
            503, f"{member.api.config.name} cannot be loaded: {why}", code="model_unavailable", retry_after=left
        )

    def _full(self) -> bool:
        most = self.config.max_resident
        return most is not None and sum(member.resident for member in self.members) >= most

    async def _make_room(self, needy: Member) -> None:
        """Swap out one other model, waiting until one is idle."""
        began = time.monotonic()
        victim: Member | None = None
        try:
            while True:
                others = [member for member in self.members if member.resident and member is not needy]
                if not others:
                    return
                if victim is None and time.monotonic() - began > PATIENCE:
                    victim = min(others, key=lambda member: member.since)
                    victim.leaving = True
                idle = [member for member in ([victim] if victim else others) if not member.busy]
                if idle:
                    await self._swap_out(min(idle, key=lambda member: member.used))
                    return
                await asyncio.sleep(0.02)
        finally:
            if victim is not None:
                victim.leaving = False

    async def _swap_out(self, member: Member) -> None:
        member.leaving = True
        try:
            await member.client.stop()
        finally:
            member.leaving = False
        log.info("%s is out of memory", member.api.config.name)

    async def _sweep(self, idle: float) -> None:
        """Swap out whoever has not been used for `idle` seconds."""
        while True:
            await asyncio.sleep(min(idle / 4, 5.0))
            for member in self.members:
                old = time.monotonic() - max(member.used, member.since) > idle
                if old and member.resident and not member.busy and not self._turn.locked():
                    async with self._turn:
                        with contextlib.suppress(TwofoldError):
                            await self._swap_out(member)
