"""Reference: the policy that another is held to, and how likely it finds a batch's targets.

full weights    a frozen copy of the model that the run began with, divided among ranks as the policy is
LoRA            the policy itself, its adapters switched off: no second copy
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from ..data import Batch
from ..models.decoder import Decoder
from ..models.lora import off
from ..train import build
from ..train.axes import Axes
from ..train.config import Recipe
from ..train.offload import Offload
from ..train.trainer import Trainer
from ..train.zero import Zero, local
from .judged import target_logprobs


class Reference:
    """What a run began with. It learns nothing, so it keeps no gradients and no states."""

    def __init__(self, recipe: Recipe, trainer: Trainer, temperature: float = 1.0) -> None:
        """Load a frozen copy, or find that the policy's adapters can be switched off."""
        self._look = target_logprobs(temperature)
        self.decoder: Decoder | None = None
        self._zero: Zero[Decoder] | None = None
        if recipe.lora is None:
            axes = Axes(trainer.mesh, recipe.parallel)
            plain = replace(recipe, model=replace(recipe.model, recompute="none", recompute_layers={}))
            self.decoder, self._zero, _ = build.build_model(plain, None, axes, Offload())
            self.decoder.requires_grad_(False)

    @property
    def bytes(self) -> int:
        """What this rank holds of it."""
        weights = self.decoder.parameters() if self.decoder else ()
        return sum(local(weight).nbytes for weight in weights)

    def logprobs(self, trainer: Trainer, batch: Batch) -> Tensor:
        """log p of each target of a batch, fp32 [T], 0 where nothing is learned; a collective."""
        apart: AbstractContextManager[object] = nullcontext() if self.decoder else off(trainer.decoder)
        with torch.no_grad(), apart:
            found_T = trainer.read(batch, self._look, self.decoder)
        (self._zero or trainer.zero).settle()
        return found_T

    def beside(self, trainer: Trainer, batch: Batch) -> Batch:
        """The batch with `ref`, the reference's log-probabilities, beside each target."""
        return replace(batch, beside={**batch.beside, "ref": self.logprobs(trainer, batch)})
