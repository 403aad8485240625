"""Judged: an objective over whole sequences, which sees the log-probability of every target of a micro-batch at once.

    hidden [T, D] ─▶ rows with a target [R, D] ─▶ log p [R], and what the batch says beside each [R]
                                                     │
    sequences     0 0 0 0 1 1 1 2 2 2 2 2   owner_R  ▼
                                                  loss: a sum over the micro-batch

Shapes: T tokens of a micro-batch, R of them with a target, S sequences, D hidden size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..data import Batch
from ..models.decoder import Decoder
from ..train.loss import IGNORE, Loss
from ..train.objective import Sums
from ..train.trainer import Look


@dataclass(frozen=True)
class Seen:
    """What a forward pass says of a micro-batch's targets; gradients flow from all of it.

    `owner_R` is the sequence of each target, 0 to `sequences` - 1, rising. `beside` is `Batch.beside` at the targets.
    """

    decoder: Decoder
    hidden_RD: Tensor
    ids_R: Tensor
    owner_R: Tensor
    sequences: int
    beside: Mapping[str, Tensor]
    temperature: float = 1.0

    @cached_property
    def logprobs_R(self) -> Tensor:
        """log p of each target, of the distribution that was sampled from: the engine's bits."""
        return self.decoder.logprobs(self.hidden_RD, self.ids_R, temperature=self.temperature)

    @cached_property
    def scores_R(self) -> Tensor:
        """What the score head says behind each target's predecessor, fp32."""
        return self.decoder.scores(self.hidden_RD)[:, 0]

    def per_sequence(self, values_R: Tensor) -> Tensor:
        """Sums [S] over each sequence's targets."""
        return values_R.new_zeros(self.sequences).index_add(0, self.owner_R, values_R)


class Judged(ABC):
    """The base of alignment's objectives; `names` are those of the sums that `loss` gives beside the loss."""

    each: Loss | None = None
    names: tuple[str, ...] = ()
    temperature: float = 1.0

    @abstractmethod
    def size(self, batch: Batch) -> float:
        """What the sum over a step's whole batch is divided by."""

    @abstractmethod
    def loss(self, seen: Seen) -> tuple[Tensor, Mapping[str, float | Tensor]]:
        """The sum over a micro-batch, and what `names` says, sums over it too."""

    def rows(self, part: Batch) -> Tensor:
        """The tokens that `loss` sees, int64 [R]: those with a target."""
        return (part.targets_T != IGNORE).nonzero().squeeze(1)

    def touch(self, decoder: Decoder, hidden_TD: Tensor) -> Tensor:
        """Something that hangs on every weight that `loss` does, for a part that nothing falls into."""
        return decoder.logprobs(hidden_TD[:1], torch.zeros(1, dtype=torch.int64))

    def figures(self, sums: Sums) -> dict[str, float]:
        """What the journal keeps."""
        return {}

    def backward(
        self, decoder: Decoder, hidden_TD: Tensor, targets_T: Tensor, part: Batch, total: float, vocab: int
    ) -> Sums:
        rows_R = self.rows(part)
        if not len(rows_R):
            torch.autograd.backward(self.touch(decoder, hidden_TD).sum() * 0.0)
            return dict.fromkeys(("loss", *self.names), 0.0)
        value, found = self.loss(self.seen(decoder, hidden_TD, part, rows_R))
        torch.autograd.backward(value / total)
        return {"loss": float(value.detach())} | {name: float(found[name]) for name in self.names}

    def seen(self, decoder: Decoder, hidden_TD: Tensor, part: Batch, rows_R: Tensor) -> Seen:
        """Some tokens of a micro-batch, as `loss` takes them."""
        return Seen(
            decoder=decoder,
            hidden_RD=hidden_TD.index_select(0, rows_R),
            ids_R=part.targets_T.index_select(0, rows_R),
            owner_R=owners(part).index_select(0, rows_R),
            sequences=len(part.lengths),
            beside={name: value_T.index_select(0, rows_R) for name, value_T in part.beside.items()},
            temperature=self.temperature,
        )


def owners(part: Batch) -> Tensor:
    """The number of each token's sequence, int64 [T]."""
    lengths = torch.tensor(part.lengths)
    return torch.repeat_interleave(torch.arange(len(lengths)), lengths)


def target_logprobs(temperature: float = 1.0) -> Look:
    """What `Trainer.read` takes: log p of each target where it is learned, 0 elsewhere."""

    def look(decoder: Decoder, hidden_TD: Tensor, ids_T: Tensor, part: Batch) -> Tensor:
        out_T = torch.zeros(len(ids_T))
        rows_R = (part.targets_T != IGNORE).nonzero().squeeze(1)
        if len(rows_R):
            hidden_RD, ids_R = hidden_TD.index_select(0, rows_R), part.targets_T[rows_R]
            out_T[rows_R] = decoder.logprobs(hidden_RD, ids_R, temperature=temperature)
        return out_T

    return look


def token_scores(decoder: Decoder, hidden_TD: Tensor, ids_T: Tensor, part: Batch) -> Tensor:
    """What the score head says at each token: a `Look` for `Trainer.read`."""
    return decoder.scores(hidden_TD)[:, 0].float()
