"""Direct preference optimization: pairs teach the policy itself, without a reward model (Rafailov et al. 2023).

    pair ─▶ policy    ─▶ log π(answer)      ─┐
         └▶ reference ─▶ log π_ref(answer)  ─┴▶ the loss that `dpo.loss` names (`preference.py`)

KTO has single answers with a label instead; what it compares them with is the KL of prompts with others' answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..data import Batch
from ..data.pairs import PairLoader, UnpairedLoader
from ..train.lesson import Lesson
from ..train.objective import Sums
from ..train.pieces import Stored
from ..train.step import Step
from ..train.trainer import Trainer
from .aggregate import sequence_sums
from .judged import Judged, Seen, target_logprobs
from .pairwise import PAIR_FIGURES, Held, pair_means, pairs_of, target_rows, tell
from .preference import kto, kto_baseline, pair_loss, preference_figures
from .preference_config import DpoConfig
from .reference import Reference


class PairLoss(Judged):
    """The mean loss of a batch of pairs; `ref` beside each target where there is a reference."""

    names = PAIR_FIGURES

    def __init__(self, config: DpoConfig) -> None:
        self.config = config

    def size(self, batch: Batch) -> float:
        return batch.own // 2

    def loss(self, seen: Seen) -> tuple[Tensor, Mapping[str, float | Tensor]]:
        return self.of(seen.logprobs_R, seen.owner_R, seen.sequences, seen.beside.get("ref"))

    def of(
        self, logp_R: Tensor, owner_R: Tensor, sequences: int, ref_R: Tensor | None
    ) -> tuple[Tensor, Mapping[str, float | Tensor]]:
        """The summed loss of pairs from the log-probabilities of their tokens, and figures."""
        loss_P, chosen_P, rejected_P = pair_loss(pairs_of(logp_R, owner_R, sequences, ref_R), self.config)
        return loss_P.sum(), preference_figures(chosen_P, rejected_P)

    def figures(self, sums: Sums) -> dict[str, float]:
        return pair_means(sums)


class LabelLoss(Judged):
    """KTO's mean loss of a batch of labelled answers; `baseline` is set for each step."""

    names = ("desirable", "undesirable", "desirable_reward", "undesirable_reward", "baseline")

    def __init__(self, config: DpoConfig) -> None:
        self.config = config
        self.baseline = torch.zeros(())

    def size(self, batch: Batch) -> float:
        return batch.own

    def loss(self, seen: Seen) -> tuple[Tensor, Mapping[str, float | Tensor]]:
        return self.of(seen.logprobs_R - seen.beside["ref"], seen.beside["label"], seen.owner_R, seen.sequences)

    def of(
        self, log_ratio_R: Tensor, label_R: Tensor, owner_R: Tensor, sequences: int
    ) -> tuple[Tensor, Mapping[str, float | Tensor]]:
        """The summed loss of answers from log(π / π_ref) of their tokens and what they are labelled, and figures."""
        ratio_S = sequence_sums(log_ratio_R, owner_R, sequences)
        label_S = torch.zeros(sequences).index_copy(0, owner_R, label_R) > 0.5
        has_S = torch.bincount(owner_R, minlength=sequences) > 0
        config = self.config
        weights = config.desirable_weight, config.undesirable_weight
        loss_S = kto(ratio_S, label_S, self.baseline, config.beta, *weights)
        reward_S, good_S, bad_S = config.beta * ratio_S.detach(), has_S & label_S, has_S & ~label_S
        return loss_S[has_S].sum(), {
            "desirable": good_S.sum(),
            "undesirable": bad_S.sum(),
            "desirable_reward": reward_S[good_S].sum(),
            "undesirable_reward": reward_S[bad_S].sum(),
            "baseline": self.baseline * has_S.sum(),
        }

    def figures(self, sums: Sums) -> dict[str, float]:
        good, bad = max(sums["desirable"], 1.0), max(sums["undesirable"], 1.0)
        chosen, rejected = sums["desirable_reward"] / good, sums["undesirable_reward"] / bad
        mean = sums["baseline"] / max(sums["desirable"] + sums["undesirable"], 1.0)
        return {"margin": chosen - rejected, "chosen": chosen, "rejected": rejected, "baseline": mean}


@dataclass
class PairLesson(Lesson):
    """A batch of pairs a step."""

    objective: PairLoss
    loader: PairLoader
    valid: Sequence[Batch]
    reference: Reference | None = field(default=None, init=False)

    def begin(self, trainer: Trainer, stored: Stored | None) -> None:
        if self.objective.config.reference:
            self.reference = Reference(trainer.recipe, trainer)

    def step(self, trainer: Trainer) -> Step:
        return trainer.step(self._beside(trainer, self.loader.batch(trainer.position.batch)), self.objective)

    def examine(self, trainer: Trainer) -> None:
        held = Held()
        for batch in self.valid:
            given = self._beside(trainer, batch)
            rows_R, owner_R = target_rows(batch)
            logp_R = trainer.read(batch, target_logprobs())[rows_R]
            ref_R = given.beside["ref"][rows_R] if self.reference else None
            held.add(*self.objective.of(logp_R, owner_R, len(batch.lengths), ref_R))
        tell(trainer, held)

    def _beside(self, trainer: Trainer, batch: Batch) -> Batch:
        return self.reference.beside(trainer, batch) if self.reference else batch

    def line(self, figures: dict[str, float]) -> str:
        return f"accuracy {figures['accuracy']:.2f}  margin {figures['margin']:+.3f}" if "accuracy" in figures else ""


@dataclass
class LabelLesson(Lesson):
    """A batch of labelled answers a step, and the same prompts with each other's answers for the baseline."""

    objective: LabelLoss
    loader: UnpairedLoader
    valid: Sequence[tuple[Batch, Batch]]
    reference: Reference = field(init=False)

    def begin(self, trainer: Trainer, stored: Stored | None) -> None:
        self.reference = Reference(trainer.recipe, trainer)

    def step(self, trainer: Trainer) -> Step:
        number = trainer.position.batch
        self.objective.baseline = self._baseline(trainer, self.loader.mismatched(number))
        return trainer.step(self.reference.beside(trainer, self.loader.batch(number)), self.objective)

    def examine(self, trainer: Trainer) -> None:
        if not self.valid:
            return
        summed, answers, sums = 0.0, 0.0, Sums()
        for batch, mismatched in self.valid:
            self.objective.baseline = self._baseline(trainer, mismatched)
            rows_R, owner_R = target_rows(batch)
            ratio_T = trainer.read(batch, target_logprobs()) - self.reference.logprobs(trainer, batch)
            label_R = batch.beside["label"][rows_R]
            loss, found = self.objective.of(ratio_T[rows_R], label_R, owner_R, len(batch.lengths))
            summed, answers = summed + float(loss), answers + self.objective.size(batch)
            sums = {name: sums.get(name, 0.0) + float(value) for name, value in found.items()}
        value, figures, step = summed / answers, self.objective.figures(sums), trainer.position.step
        trainer.journal.add(step, valid_loss=value, eval=figures)
        trainer.display.say(f"step {step}: held-out loss {value:.4f}, margin {figures['margin']:+.3f}")

    def _baseline(self, trainer: Trainer, mismatched: Batch) -> Tensor:
        rows_R, owner_R = target_rows(mismatched)
        with torch.no_grad():
            logp_T = trainer.read(mismatched, target_logprobs()) - self.reference.logprobs(trainer, mismatched)
        return kto_baseline(sequence_sums(logp_T[rows_R], owner_R, len(mismatched.lengths)))

    def line(self, figures: dict[str, float]) -> str:
        return f"margin {figures['margin']:+.3f}" if "margin" in figures else ""
