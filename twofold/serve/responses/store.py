"""Store: the answers that are kept, each found by its owner alone; the oldest go when there are too many.

Kept in memory: a restart of the server forgets them, as its operator would expect of what strangers wrote.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import msgspec

from ...core import CapacityError
from ..config import Limits
from ..errors import HttpError
from .items import Message, answered
from .shapes import Response

if TYPE_CHECKING:
    from .running import Run


class Kept:
    """One answer: `items` are its input as it was sent, `messages` everything that was said before it."""

    def __init__(self, owner: str, response: Response, items: list[dict[str, Any]], messages: list[Message]) -> None:
        self.owner = owner
        self.response = response
        self.items = items
        self.messages = messages
        self.run: Run | None = None
        self.born = time.monotonic()
        self.size = 0

    @property
    def running(self) -> bool:
        return self.response.status in ("queued", "in_progress")

    def weigh(self) -> int:
        """Bytes, by what it would be as JSON; the past of a long talk is counted with each of its turns."""
        told = sum(map(len, self.run.log)) if self.run is not None else 0
        return told + len(msgspec.json.encode((self.response, self.items, self.messages)))

    def next_turn(self) -> list[Message]:
        """What the next answer's chat begins with."""
        return [*self.messages, *answered(self.response.output)]


class Store:
    """Bounded in entries, bytes and age by the limits that hold at the moment."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._kept: dict[str, Kept] = {}  # oldest first
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, kept: Kept) -> None:
        """Keep one more.

        Raises:
            CapacityError: it is full of answers that are still being written.
        """
        self._drop_old()
        if len(self._kept) >= self.limits.responses and not self._drop_one():
            raise CapacityError(f"{len(self._kept)} stored answers are being written, no more fit: try again later")
        self._kept[kept.response.id] = kept
        self.weigh(kept)

    def weigh(self, kept: Kept) -> None:
        """Count a kept answer as large as it has become; older ones go when that is too much."""
        if kept.response.id not in self._kept:
            return
        size = kept.weigh()
        self._bytes += size - kept.size
        kept.size = size
        while self._bytes > self.limits.response_bytes and self._drop_one():
            pass

    def get(self, owner: str, name: str, param: str | None = None) -> Kept:
        """The answer called `name`; 404 when there is none of this owner's."""
        self._drop_old()
        kept = self._kept.get(name)
        if kept is None or kept.owner != owner:
            raise HttpError(
                404, f"no response '{name:.80}' is kept: it is not yours, was deleted, or is too old", param=param,
                code="response_not_found",
            )  # fmt: skip
        return kept

    def delete(self, kept: Kept) -> None:
        self._kept.pop(kept.response.id, None)
        self._bytes -= kept.size

    def _drop_old(self) -> None:
        limit = time.monotonic() - self.limits.response_seconds
        while self._kept and (oldest := next(iter(self._kept.values()))).born < limit and not oldest.running:
            self.delete(oldest)

    def _drop_one(self) -> bool:
        """Delete the oldest that is not being written; False when all are."""
        for kept in self._kept.values():
            if not kept.running:
                self.delete(kept)
                return True
        return False
