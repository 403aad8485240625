"""Reward models: the better answer of each pair is to have the higher score (Bradley & Terry 1952).

pair ─▶ decoder ─▶ score of each answer's last token ─▶ -log σ(s_chosen - s_rejected - margin) + centring · (s + s)²
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ..data import Batch
from ..models.decoder import Decoder
from ..train.lesson import Lesson
from ..train.objective import Sums
from ..train.step import Step
from ..train.trainer import Trainer
from .judged import Judged, Seen, token_scores
from .pairwise import PAIR_FIGURES, Held, pair_means, tell
from .preference import bradley_terry, preference_figures
from .preference_config import RewardModelConfig
from .scorer import read_length


class BradleyTerry(Judged):
    """The mean loss of a batch of pairs, whose scores are read at each answer's last token that is not `pad`."""

    names = PAIR_FIGURES

    def __init__(self, config: RewardModelConfig, pad: int | None = None) -> None:
        self.config, self.pad = config, pad

    def size(self, batch: Batch) -> float:
        return batch.own // 2

    def rows(self, part: Batch) -> Tensor:
        lengths = part.lengths[: part.own]
        texts = part.ids_T[: sum(lengths)].split(lengths)
        starts = accumulate(lengths, initial=0)
        last = [start + read_length(ids.tolist(), self.pad) - 1 for start, ids in zip(starts, texts)]
        return torch.tensor(last, dtype=torch.int64)

    def touch(self, decoder: Decoder, hidden_TD: Tensor) -> Tensor:
        return decoder.scores(hidden_TD[:1])

    def loss(self, seen: Seen) -> tuple[Tensor, Mapping[str, float | Tensor]]:
        return self.of(seen.scores_R, seen.beside["margin"])

    def of(self, scores_S: Tensor, margin_S: Tensor) -> tuple[Tensor, Mapping[str, float | Tensor]]:
        """The summed loss of pairs from the scores of their answers, chosen and rejected in turn, and figures."""
        chosen_P, rejected_P = scores_S[::2], scores_S[1::2]
        margin_P: Tensor | float = margin_S[::2] if self.config.margin == "column" else 0.0
        loss_P = bradley_terry(chosen_P, rejected_P, margin_P, self.config.centring)
        return loss_P.sum(), preference_figures(chosen_P.detach(), rejected_P.detach())

    def figures(self, sums: Sums) -> dict[str, float]:
        return pair_means(sums)


@dataclass
class RewardLesson(Lesson):
    """A batch of pairs a step; what is held out is scored every now and then."""

    objective: BradleyTerry
    valid: Sequence[Batch]

    def step(self, trainer: Trainer) -> Step:
        return trainer.step(trainer.data.train.batch(trainer.position.batch), self.objective)

    def examine(self, trainer: Trainer) -> None:
        held = Held()
        for batch in self.valid:
            scores_S = trainer.read(batch, token_scores)[self.objective.rows(batch)]
            margin_S = batch.beside["margin"][self.objective.rows(batch)]
            held.add(*self.objective.of(scores_S, margin_S))
        tell(trainer, held)

    def line(self, figures: dict[str, float]) -> str:
        return f"accuracy {figures['accuracy']:.2f}  margin {figures['margin']:+.3f}" if "accuracy" in figures else ""
