"""What runs that learn from pairs have in common: their figures, and what is seen on pairs that are held out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ..data import Batch
from ..train.loss import IGNORE
from ..train.objective import Sums
from ..train.trainer import Trainer
from .aggregate import sequence_lengths, sequence_sums
from .estimates import wilson
from .judged import owners
from .preference import Pairs

PAIR_FIGURES = ("accuracy", "margin", "chosen", "rejected", "pairs")


def pair_means(sums: Mapping[str, float]) -> dict[str, float]:
    """Means over pairs of what `preference_figures` added up."""
    return {name: sums[name] / max(sums["pairs"], 1.0) for name in PAIR_FIGURES if name != "pairs"}


def pairs_of(logp_R: Tensor, owner_R: Tensor, sequences: int, ref_R: Tensor | None = None) -> Pairs:
    """Chosen and rejected answers, in turn, from the log-probabilities of their tokens."""
    sums_S = sequence_sums(logp_R, owner_R, sequences)
    counts_S = sequence_lengths(owner_R, sequences).clamp(min=1).float()
    ref_S = None if ref_R is None else sequence_sums(ref_R, owner_R, sequences)
    return Pairs(
        chosen_P=sums_S[::2],
        rejected_P=sums_S[1::2],
        chosen_tokens_P=counts_S[::2],
        rejected_tokens_P=counts_S[1::2],
        ref_chosen_P=None if ref_S is None else ref_S[::2],
        ref_rejected_P=None if ref_S is None else ref_S[1::2],
    )


def target_rows(batch: Batch) -> tuple[Tensor, Tensor]:
    """The tokens with a target, int64 [R], and each one's sequence."""
    rows_R = (batch.targets_T != IGNORE).nonzero().squeeze(1)
    return rows_R, owners(batch)[rows_R]


@dataclass
class Held:
    """Sums over what is held out."""

    loss: float = 0.0
    sums: Sums = field(default_factory=dict)

    def add(self, loss: Tensor, figures: Mapping[str, float | Tensor]) -> None:
        self.loss += float(loss)
        self.sums = {name: self.sums.get(name, 0.0) + float(value) for name, value in figures.items()}

    def figures(self) -> dict[str, float]:
        """Means, and the interval of the accuracy (Wilson, 95%)."""
        pairs = self.sums.get("pairs", 0.0)
        if not pairs:
            return {}
        found = {"loss": self.loss / pairs} | pair_means(self.sums)
        rate = wilson(round(self.sums["accuracy"]), round(pairs))
        return found | {"low": rate.low, "high": rate.high, "pairs": pairs}


def tell(trainer: Trainer, held: Held) -> None:
    """Write down and say what was seen of the held-out pairs."""
    found, step = held.figures(), trainer.position.step
    if not found:
        return
    trainer.journal.add(step, eval=found, valid_loss=found["loss"])
    trainer.display.say(
        f"step {step}: held-out loss {found['loss']:.4f}, accuracy {found['accuracy']:.3f} "
        f"({found['low']:.3f} to {found['high']:.3f}), margin {found['margin']:+.3f}"
    )
