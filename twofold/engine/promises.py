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


class Promises:
    """The prefix cache as rows use it; without caching every question is answered with nothing."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._kept_by: dict[bytes, int] = {}  # digest of a block being computed -> serial of the row that does it

    def waits(self, row: Row) -> bool:
        """Whether the block that a row was found to wait for is still being computed."""
        return row.waits_for in self._kept_by

    def find(self, row: Row) -> list[int] | None:
        """The cached blocks that a row can start on, or None when its next one is on its way and it should wait."""
        if not self._pool.caching:
            return []
        found = self._pool.find(row.chain[: row.readable])
        if len(found) < min(row.readable, len(row.chain)) and row.chain[len(found)][0] in self._kept_by:
            row.waits_for = row.chain[len(found)][0]
            return None
        return found

    def make(self, row: Row) -> None:
        """Promise the full blocks of a row that starts on top of its published ones."""
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

    def _withdraw(self, row: Row, place: int) -> None:
        digest = row.chain[place][0]
        if self._kept_by.get(digest) == row.serial:
            del self._kept_by[digest]

    def check_integrity(self, running: Iterable[Row]) -> None:
        """Raises StateError when a request promises that does not run; always a bug in Twofold."""
        if not set(self._kept_by.values()) <= {row.serial for row in running}:
            raise StateError("a block is promised by a request that does not run")
