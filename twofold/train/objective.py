"""Objective: what a step makes smaller, whatever its batch is cut into.

    hidden [T, D] of a micro-batch ─▶ backward: gradients of (sum / size of the whole step) ─▶ sums by name
    sums of all micro-batches and ranks ─▶ the step's loss (sums["loss"] / size), figures for the journal

`Tokens` learns a text; those of alignment are in `align/`.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ..data import Batch
from ..models.decoder import Decoder
from . import loss as losses

Sums = dict[str, float]
"""Numbers that add up over micro-batches and ranks, the same names in each; "loss" is one of them."""


class Objective(Protocol):
    """A loss that is a sum over a batch divided by the batch's size."""

    @property
    def each(self) -> losses.Loss | None:
        """The loss where it is a sum over tokens that need nothing of each other, as a pipeline's stages do it."""

    def size(self, batch: Batch) -> float:
        """What the sum over all of a step's batch is divided by; 0: there is nothing to learn."""
        ...

    def backward(
        self, decoder: Decoder, hidden_TD: Tensor, targets_T: Tensor, part: Batch, total: float, vocab: int
    ) -> Sums:
        """Add the gradient of (the sum over a micro-batch / `total`) to every weight.

        A part without targets still gives every weight a gradient, of zeros, for ranks reduce together.
        """
        ...

    def figures(self, sums: Sums) -> dict[str, float]:
        """What the journal keeps of a step's sums."""
        ...


class Tokens:
    """The mean over all targets of a loss that needs nothing but its token: left out, the negative log-probability."""

    def __init__(self, each: losses.Loss = losses.next_token) -> None:
        self.each = each

    def size(self, batch: Batch) -> float:
        return int((batch.targets_T != losses.IGNORE).sum())

    def backward(
        self, decoder: Decoder, hidden_TD: Tensor, targets_T: Tensor, part: Batch, total: float, vocab: int
    ) -> Sums:
        return {"loss": losses.backward(decoder, hidden_TD, targets_T, total, vocab, self.each)}

    def figures(self, sums: Sums) -> dict[str, float]:
        return {}


NEXT_TOKEN: Objective = Tokens()
