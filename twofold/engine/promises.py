"""Promises: which named blocks can be found, which are being computed right now, and by whom.

    _ named _ promised _ ........ a running row's blocks: published ones can be found by anybody, promised ones will be

A request that needs a promised block waits for it instead of computing it again. Only running rows promise, and those
wait for nobody, so there is no cycle.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..core import StateError
from .blocks import BlockPool
from .row import Row
from .tiers import Tiers


class Promises:
    """The prefix cache as rows use it; without caching every question is answered with nothing.

    `tiers` hold what the pool has not.
    """

    def __init__(self, pool: BlockPool, tiers: Tiers | None = None) -> None:
        self._pool = pool
        self._tiers = tiers
        self._kept_by: dict[bytes, int] = {}  # digest of a block being computed -> serial of the row that does it

    def waits(self, row: Row) -> bool:
        """Whether the block that a row was found to wait for is still being computed."""
        return row.waits_for in self._kept_by

    def find(self, row: Row) -> list[int] | None:
        """The cached blocks that a row can start on, or None when its next one is on its way and it should wait."""
        if not self._pool.caching:
            return []
        return self._unless_promised(row, self._pool.find(row.chain[: row.readable]))

    def fetch(self, row: Row, found: list[int]) -> list[int] | None:
        """As `find`, with what the tiers have beyond the `found` blocks, for a row that there is room for."""
        if self._tiers is None or not self._pool.caching:
            return found
        more = self._tiers.arrived(row, found)
        return None if more is None else self._unless_promised(row, more)

    def _unless_promised(self, row: Row, found: list[int]) -> list[int] | None:
        if len(found) < min(row.readable, len(row.chain)) and row.chain[len(found)][0] in self._kept_by:
            row.waits_for = row.chain[len(found)][0]
            return None
        return found

    @property
    def loading(self) -> bool:
        """Whether any row waits for a tier."""
        return self._tiers is not None and self._tiers.loading

    def begin(self, row: Row, found: list[int]) -> None:
        """Give a row that starts the blocks found for it, and promise those that it will compute."""
        self._pool.acquire(found)
        row.grow(found)
        row.waits_for = None
        row.found = row.request.num_computed = len(found) * self._pool.block_size
        row.published = row.promised = len(found)
        if self._tiers is not None:
            self._tiers.started(row)
        for digest, _ in row.chain[row.promised :]:
            self._kept_by.setdefault(digest, row.serial)
        row.promised = len(row.chain)

    def publish(self, row: Row) -> None:
        """Name the blocks that became full, so that others can find them, and keep the promises made of them."""
        full = row.request.num_computed // self._pool.block_size
        if full == row.published or not self._pool.caching:
            return
        row.name_blocks(row.request.num_computed)
        for place in range(row.published, full):
            self._pool.publish(row.blocks[place], row.chain[place])
            self._withdraw(row, place)
        row.published = full
        row.promised = max(row.promised, full)

    def break_all(self, row: Row) -> None:
        """Withdraw what a row that leaves has promised and not computed."""
        for place in range(row.published, row.promised):
            self._withdraw(row, place)
        if self._tiers is not None:
            self._tiers.left(row)

    def _withdraw(self, row: Row, place: int) -> None:
        digest = row.chain[place][0]
        if self._kept_by.get(digest) == row.serial:
            del self._kept_by[digest]

    def check_integrity(self, running: Iterable[Row], waiting: Iterable[Row]) -> None:
        """Raises StateError when a request promises that does not run, or loads and does not wait; always a bug."""
        if not set(self._kept_by.values()) <= {row.serial for row in running}:
            raise StateError("a block is promised by a request that does not run")
        if self._tiers is not None:
            self._tiers.check_integrity(waiting)
