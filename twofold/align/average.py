"""Average: a moving average of the policy's weights, kept in fp32 by each rank of its slices (DeepSpeed-Chat's EMA)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..train.adapters import quantized
from ..train.export import export, export_adapter
from ..train.pieces import Piece, Stored
from ..train.trainer import Trainer

NAME = "lesson.average."


class Average:
    """After each step: average ← decay · average + (1 - decay) · weights."""

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self._kept: dict[str, Tensor] = {}

    @torch.no_grad()
    def begin(self, trainer: Trainer, stored: Stored | None) -> None:
        """Begin with the weights as they are, or take back what a checkpoint has."""
        for name in trainer.optimizer.weights:
            self._kept[name] = trainer.optimizer.master(name).clone()
            if stored is not None:
                self._kept[name].copy_(stored.read(NAME + name, trainer.places[name]))

    @torch.no_grad()
    def move(self, trainer: Trainer) -> None:
        """Take the weights of this step in."""
        trainer.zero.settle()
        for name, kept in self._kept.items():
            kept.lerp_(trainer.optimizer.master(name), 1.0 - self.decay)

    def pieces(self, trainer: Trainer) -> dict[str, Piece]:
        """What the checkpoint keeps."""
        return {NAME + name: Piece(trainer.places[name], kept, kept.dtype) for name, kept in self._kept.items()}

    @torch.no_grad()
    def export(self, trainer: Trainer) -> None:
        """Write the average beside the run's own as `model-average`; a collective.

        Beside a quantized base, to which adapters cannot be added, it is `adapter-average`.
        """
        own = {name: trainer.optimizer.master(name).clone() for name in self._kept}
        self._put(trainer, self._kept)
        if quantized(trainer.recipe):
            export_adapter(trainer, trainer.recipe.run.output / "adapter-average")
        else:
            export(trainer, trainer.recipe.run.output / "model-average")
        self._put(trainer, own)

    def _put(self, trainer: Trainer, values: dict[str, Tensor]) -> None:
        trainer.zero.settle()
        for name, value in values.items():
            trainer.optimizer.put(name, value)
