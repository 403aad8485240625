"""Deadlines: whose time is over, without looking at everybody in every step."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from .row import Row


class Deadlines:
    """A heap of instants; who has ended meanwhile is still in it, so its reader checks the serial."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, str]] = []

    def add(self, row: Row) -> None:
        """Note a row's deadline, if it has one."""
        if row.request.deadline is not None:
            heapq.heappush(self._heap, (row.request.deadline, row.serial, row.request.id))

    def passed(self, now: float) -> Iterator[tuple[str, int]]:
        """The id and serial of each row whose deadline is not after `now`, once."""
        while self._heap and self._heap[0][0] <= now:
            _, serial, request_id = heapq.heappop(self._heap)
            yield request_id, serial
