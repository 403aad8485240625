"""Proposer: who guesses at the next tokens, so that one step may decide several. A guess changes the speed alone.

Scheduler.plan ──▶ propose(rows, room) ──▶ drafts ride behind each row's last token ──▶ told(row, drafted, kept)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from .row import Row


class Proposer(Protocol):
    """Guesses at how requests go on."""

    def propose(self, rows: Sequence[Row], room: int) -> dict[int, tuple[int, ...]]:
        """Drafts by the serial of their row, at most `room` tokens together and `row.guessable` for one."""

    def told(self, row: Row, drafted: int, kept: int) -> None:
        """A step has shown that the first `kept` of a row's `drafted` guesses were right."""

    def forget(self, row: Row) -> None:
        """A row has ended, and its output is all there is."""
