"""Training a draft head: the loss of what it says against what a frozen model says (`models/draft_head.py`).

    tokens ─▶ model, frozen ─▶ h ─▶ p(next)
         └──▶ head ──────────▶ f ─▶ q(next)       hidden_weight · smooth L1(f, h) + token_weight · KL(p ‖ q)

Shapes: T tokens of a micro-batch, R of them with a target, C of those in a chunk, K depths, D hidden size,
V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import Batch
from ..models import weights
from ..models.decoder import Decoder
from ..models.draft_head import Reading
from . import loss as losses
from .build import DTYPES
from .config import Recipe
from .draft_config import DraftHeadConfig
from .lesson import Lesson
from .objective import Sums
from .pieces import Stored
from .step import Step
from .trainer import Trainer


class DraftLoss:
    """The mean over all tokens that have a target; in chunks, as the tokens' own loss.

    Figures: `hidden` and `kl`, means over the depths, and `accept_k`: at what share of the tokens the likeliest guess
    at depth k is the model's likeliest token, where the tokens before are given. A served head reads its own hidden
    states for the last k - 1 places alone, and is right a little more often.
    """

    each: losses.Loss | None = None

    def __init__(self, config: DraftHeadConfig, reading: Reading) -> None:
        self.config, self.reading = config, reading

    def size(self, batch: Batch) -> float:
        return int((batch.targets_T != losses.IGNORE).sum())

    def backward(
        self, decoder: Decoder, hidden_TD: Tensor, targets_T: Tensor, part: Batch, total: float, vocab: int
    ) -> Sums:
        sums, grad = self._look(hidden_TD, targets_T, vocab, total)
        torch.autograd.backward(hidden_TD, grad)
        return sums

    def measure(self, hidden_TD: Tensor, targets_T: Tensor, vocab: int) -> Sums:
        """The sums of a micro-batch, without gradients."""
        return self._look(hidden_TD, targets_T, vocab, None)[0]

    def _look(self, said_TD: Tensor, targets_T: Tensor, vocab: int, total: float | None) -> tuple[Sums, Tensor]:
        """The sums, and by `total` the gradient of what was said at all depths, [K·T, D]."""
        config, seen_TD = self.config, self.reading.seen_TD
        said_KTD = said_TD.detach().view(config.depth, *seen_TD.shape)
        rows_R = (targets_T != losses.IGNORE).nonzero().squeeze(1)
        names = ("loss", "hidden", "kl", *(f"accept_{depth + 1}" for depth in range(config.depth)))
        sums, grad_KTD = dict.fromkeys((*names, "rows"), 0.0), torch.zeros_like(said_KTD)
        sums["rows"] = float(len(rows_R))
        for start, stop in losses.chunks(len(rows_R), vocab):
            rows_C = rows_R[start:stop]
            seen_CD = seen_TD[rows_C]
            with torch.no_grad():
                logp_CV = self.reading.target.logits(seen_CD).log_softmax(-1)
                best_C = logp_CV.argmax(-1)
            for depth, said in enumerate(said_KTD):
                with torch.set_grad_enabled(total is not None):
                    leaf_CD = said[rows_C].requires_grad_(total is not None)
                    logq_CV = self.reading.target.logits(leaf_CD).log_softmax(-1)
                    hidden = F.smooth_l1_loss(leaf_CD, seen_CD, reduction="none").mean(-1).sum()
                    kl = F.kl_div(logq_CV, logp_CV, reduction="sum", log_target=True)
                    value = (config.hidden_weight * hidden + config.token_weight * kl) / config.depth
                if total is not None:
                    torch.autograd.backward(value / total)
                    assert leaf_CD.grad is not None
                    grad_KTD[depth, rows_C] = leaf_CD.grad
                sums["loss"] += float(value.detach())
                sums["hidden"] += float(hidden.detach()) / config.depth
                sums["kl"] += float(kl.detach()) / config.depth
                sums[f"accept_{depth + 1}"] += float((logq_CV.detach().argmax(-1) == best_C).sum())
        return sums, grad_KTD.view_as(said_TD)

    def figures(self, sums: Sums) -> dict[str, float]:
        rows = max(sums["rows"], 1.0)
        return {name: value / rows for name, value in sums.items() if name not in ("loss", "rows")}


@dataclass
class DraftLesson(Lesson):
    """A batch of texts a step, as pretraining reads them."""

    recipe: Recipe
    objective: DraftLoss = field(init=False)

    def begin(self, trainer: Trainer, stored: Stored | None) -> None:
        config, source = self.recipe.draft_head, self.recipe.model.from_
        assert config is not None and source is not None, "the recipe was checked"
        target = weights.load(source, dtype=DTYPES[self.recipe.model.dtype], device=trainer.decoder.device)
        reading = Reading(target, config.depth)
        trainer.decoder.reading = reading
        self.objective = DraftLoss(config, reading)

    def step(self, trainer: Trainer) -> Step:
        return trainer.step(trainer.data.train.batch(trainer.position.batch), self.objective)

    @torch.no_grad()
    def examine(self, trainer: Trainer) -> None:
        sums: Sums = {}
        for batch in trainer.data.valid:
            for part in trainer.axes.share(batch, trainer.recipe.data.micro_tokens):
                ids_T, targets_T, ctx = trainer.axes.place(part)
                more = self.objective.measure(trainer.decoder(ids_T, ctx), targets_T, trainer.places.spec.vocab)
                sums = {name: sums.get(name, 0.0) + value for name, value in more.items()}
        if not sums:
            return
        sums = dict(zip(sums, trainer.mesh.sum("loss", *sums.values()), strict=True))
        value, figures = sums["loss"] / max(sums["rows"], 1.0), self.objective.figures(sums)
        step = trainer.position.step
        trainer.journal.add(step, valid_loss=value, eval=figures)
        trainer.display.say(f"step {step}: held-out loss {value:.4f}, {self.line(figures)}")

    def line(self, figures: dict[str, float]) -> str:
        rates = [value for name, value in figures.items() if name.startswith("accept_")]
        return "accepted " + " ".join(f"{rate:.3f}" for rate in rates)
