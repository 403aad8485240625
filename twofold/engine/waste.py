"""Waste: how much of the cache that is allocated holds nothing."""

from __future__ import annotations

from collections.abc import Iterable

from .blocks import BlockPool
from .row import Row


class Waste:
    """Slots of blocks in use, over all steps, and those of them without a token."""

    def __init__(self) -> None:
        self._slots = 0
        self._empty = 0

    def saw(self, pool: BlockPool, running: Iterable[Row]) -> None:
        """Count one step's."""
        self._slots += pool.used * pool.block_size
        self._empty += sum(row.empty for row in running)

    @property
    def share(self) -> float:
        return self._empty / self._slots if self._slots else 0.0
