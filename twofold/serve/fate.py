"""Fate: how one sequence fared in the model's process, or in several one after the other."""

from __future__ import annotations

import time

from ..engine.facts import Facts


class Fate:
    """`started` is the instant at which it first left the queue, `deaths` how often its process died, `lost` the
    seconds between a death and its next start; `facts` are its engines' together."""

    __slots__ = ("_before", "_died", "_now", "deaths", "lost", "started")

    def __init__(self) -> None:
        self.started: float | None = None
        self.deaths = 0
        self.lost = 0.0
        self._died: float | None = None
        self._before = Facts()
        self._now = Facts()

    def start(self, ran: float = 0.0) -> None:
        """It left the queue of the process that has it now, as a step began that took `ran` seconds and is over."""
        now = time.monotonic() - ran
        if self._died is not None:
            self.lost, self._died = self.lost + max(now - self._died, 0.0), None
        if self.started is None:
            self.started = now

    def die(self) -> None:
        """The process that had it is gone."""
        self.deaths += 1
        if self._died is None:
            self._died = time.monotonic()
        self._before, self._now = self._before + self._now, Facts()

    def hear(self, facts: Facts | None) -> None:
        if facts is not None:
            self._now = facts

    @property
    def facts(self) -> Facts:
        return self._before + self._now
