"""Facts: what only an engine knows of how a request fared; and Waits, which finds why one stood in the queue.

    why  ──seats──┬──cache───────┬──(nobody is held up)──┬──seats──▶ one clock for each reason, for the whole queue
                  │              │                       │
    request    enter ─────────────────────────────────▶ start       what the clocks moved meanwhile is its own wait

What the clocks do not explain, it waited for something of its own: an adapter's slot, a prefix under way or in a tier.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import msgspec

if TYPE_CHECKING:
    from .request import Output, Request
    from .scheduler import Scheduler
    from .tiers import Tiers

SHORTEST = 1e-3  # seconds: below it nobody waited


class Facts(msgspec.Struct, frozen=True, omit_defaults=True):
    """Since the engine got the request: how often it gave its blocks back, how many tokens were guessed at and how many
    rightly, the seconds it waited by reason (`REASONS`), and the tokens that came from each tier of the cache."""

    preemptions: int = 0
    drafted: int = 0
    accepted: int = 0
    waits: dict[str, float] = {}
    tiers: dict[str, int] = {}

    def __add__(self, other: Facts) -> Facts:
        """Those of two processes that had the request one after the other."""
        return Facts(
            self.preemptions + other.preemptions,
            self.drafted + other.drafted,
            self.accepted + other.accepted,
            _sum(self.waits, other.waits),
            _sum(self.tiers, other.tiers),
        )


N = TypeVar("N", int, float)


def _sum(one: dict[str, N], other: dict[str, N]) -> dict[str, N]:
    return {name: one.get(name, 0) + other.get(name, 0) for name in {**one, **other}}


REASONS = {
    "seats": "as many requests ran as may run at once",
    "cache": "the cache had no room for it",
    "budget": "the steps were full with other requests' tokens",
    "preempted": "its blocks were taken, and it stood in the queue again",
    "adapter": "its adapter waited for a slot",
    "prefix": "another request was just computing the same prefix",
    "tier": "its prefix was being read from memory or disk",
    "grammar": "its grammar was not ready",
}


class Waits:
    """Credits waiting time to reasons; costs a step nothing while nobody waits. `clock` is the scheduler's."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, tiers: Tiers | None = None) -> None:
        self._clock = clock
        self._tiers = tiers
        self._reason: str | None = None
        self._last = clock()
        self._total: dict[str, float] = {}
        self._entered: dict[str, tuple[float, dict[str, float], bool]] = {}
        self._preemptions = 0
        self._held: dict[str, float] = {}

    def enter(self, request: Request, *, again: bool = False) -> None:
        """A request came into the queue; `again` after a preemption."""
        self._credit()
        self._entered[request.id] = (self._clock(), dict(self._total), again)

    def saw(self, scheduler: Scheduler) -> None:
        """The queue after a plan was made."""
        if not (self._entered or scheduler.waiting or scheduler.gated):
            self._last, self._reason, self._preemptions = self._clock(), None, scheduler.preemptions
            return
        self._credit()
        if scheduler.preemptions != self._preemptions:
            self._preemptions = scheduler.preemptions
            for row in scheduler.waiting:
                if row.request.preemptions and row.request.id not in self._entered:
                    self.enter(row.request, again=True)
        if self._entered:
            for row in scheduler.running:
                if row.request.id in self._entered:
                    self._leave(row.request)
        self._hold(scheduler)
        self._reason = why(scheduler, self._tiers)

    def told(self, outputs: list[Output]) -> None:
        """Forget those that have ended."""
        if self._entered or self._held:
            for output in outputs:
                if output.finish is not None:
                    self._entered.pop(output.request_id, None)
                    self._held.pop(output.request_id, None)

    def _credit(self) -> None:
        now = self._clock()
        if self._reason is not None:
            self._total[self._reason] = self._total.get(self._reason, 0.0) + now - self._last
        self._last = now

    def _leave(self, request: Request) -> None:
        began, before, again = self._entered.pop(request.id)
        left = self._clock() - began
        if again:
            _add(request, "preempted", left)
            return
        for reason, total in self._total.items():
            spent = min(total - before.get(reason, 0.0), left)
            _add(request, reason, spent)
            left -= spent
        _add(request, "tier" if request.tiers else "adapter" if request.adapter else "prefix", left)

    def _hold(self, scheduler: Scheduler) -> None:
        """Running requests whose next token waits for their grammar."""
        now, held = self._clock(), {}
        for row in scheduler.gated.values():
            name = row.request.id
            if name in self._held:
                _add(row.request, "grammar", now - self._held[name], least=0.0)
            if row.held and name not in self._entered:
                held[name] = now
        self._held = held


def why(scheduler: Scheduler, tiers: Tiers | None = None) -> str | None:
    """What holds the whole queue up, None where nothing does; the head of the queue stands for all behind it."""
    for row in scheduler.waiting:
        if sum(one.seats for one in scheduler.running) + row.seats > scheduler.max_num_seqs:
            return "seats"
        if row.waits_for is not None or (tiers is not None and tiers.holds(row)):
            continue  # held up by itself
        if not scheduler.adapters.reachable(row.request.adapter):
            continue
        return "cache" if scheduler.pool.blocks_for(row.request.num_tokens) > _spare(scheduler) else "budget"
    return None


def _spare(scheduler: Scheduler) -> int:
    """Blocks that a new request may have: those that running ones still need for their own tokens are not."""
    pool, parts = scheduler.pool, [part for row in scheduler.running for part in row.parts]
    owed = sum(max(0, pool.blocks_for(part.request.num_tokens) - len(part.blocks)) for part in parts)
    return pool.available - owed - sum(row.seats for row in scheduler.running)


def _add(request: Request, reason: str, seconds: float, least: float = SHORTEST) -> None:
    if seconds > least:
        request.waits[reason] = request.waits.get(reason, 0.0) + seconds
