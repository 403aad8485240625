"""Proposer: who guesses at the next tokens, so that one step may decide several. A guess changes the speed alone.

    Scheduler.plan ──▶ Speculation.guess ──▶ Proposer.propose ──▶ drafts ride behind each row's last token
    Scheduler.apply ─▶ Speculation.told ───▶ Proposer.told        what the model itself chose

The model samples at every place with its own number (seed, sample, position), and a draft is kept while it is what was
sampled there. So the text is the same to the bit whoever guesses, and however well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

from .plan import StepPlan, StepResult
from .row import Row

if TYPE_CHECKING:
    from torch import Tensor

    from ..models.decoder import Decoder

GRADES = 24
"""Grades of a guessed token go from 0 to one less; those of one grade are right about equally often."""


class Guess(NamedTuple):
    """How a request may go on. Each token has a grade: what the proposer knows of how sure it is."""

    tokens: tuple[int, ...]
    grades: tuple[int, ...]


class Proposer(Protocol):
    """Guesses at how requests go on."""

    @property
    def costs(self) -> bool:
        """Whether each further token costs a model's pass. If not, it is asked for more than will be sent."""

    def propose(self, wanted: Sequence[tuple[Row, int]]) -> dict[int, Guess]:
        """Up to so many tokens for each row, by the row's serial; rows without an idea are left out."""

    def told(self, row: Row, kept: int) -> None:
        """The first `kept` tokens of the row's last guess were right, and are among its outputs now."""

    def forget(self, row: Row) -> None:
        """A row has ended, and its output is all there is."""

    def sleep(self) -> None:
        """Give memory back; everything may be asked for again afterwards."""


@runtime_checkable
class Watcher(Protocol):
    """A proposer that looks at what the model itself computes."""

    def saw(self, plan: StepPlan, result: StepResult, hidden_TD: Tensor) -> None:
        """A step has been run: its tokens' hidden states [T, D], final norm applied, are good until the next one."""

    def renew(self, target: Decoder) -> None:
        """The model has new weights, in this decoder."""
