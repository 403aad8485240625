"""Gate: what a row's grammar says of its next tokens, as far as is known. Written by `grammar/masks.py`, read here."""

from __future__ import annotations

from .request import State


class Gate:
    """`forced` tokens and the `mask` after them hold where the row has `at` outputs; no mask: the text is complete.

    `held` says that a step found no mask in time: the row waits for it, and nobody waits with it.
    """

    __slots__ = ("at", "error", "forced", "held", "mask")

    def __init__(self) -> None:
        self.at = -1
        self.forced: tuple[int, ...] = ()
        self.mask = b""
        self.held = False
        self.error: str | None = None

    def end(self, said: int, least: int) -> tuple[State, str | None] | None:
        """How a row with `said` outputs, which must have `least`, ends here; None when it goes on."""
        if self.error is not None:
            return State.ERROR, self.error
        if self.at != said or self.forced or self.mask:
            return None
        if said < least:
            return State.ERROR, f"the grammar is complete after {said} tokens and min_tokens is {least}: lower it"
        return State.STOP, None

    def drafts(self, said: int) -> tuple[int, ...]:
        """What a row with `said` outputs must go on with, for a step that computes it; a last token needs none."""
        if self.at != said:
            return ()
        return self.forced if self.mask else self.forced[:-1]
