"""Exports: a run's weights as a model that others read, whatever the run has beside it.

language, reward     the model as the run has it
critic               without the value head, which only the run needs
lora                 run.output/adapter as PEFT has it, and the model with the adapters added
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..models.scoring import TENSOR, as_causal
from . import adapters, build
from .files import ModelFiles
from .pieces import Pieces
from .state import weight_pieces

if TYPE_CHECKING:
    from .trainer import Trainer


def plain(trainer: Trainer, written: torch.dtype) -> tuple[Pieces, dict[str, Any]]:
    """The weights that others read, in `written`, and their config.json. A collective where there are adapters."""
    recipe, dtype = trainer.recipe, trainer.zero.dtype
    trainer.zero.settle()
    if recipe.lora is None:
        pieces = weight_pieces(trainer.decoder, trainer.places, dtype, written)
    else:
        pieces = adapters.merged_pieces(trainer.decoder, trainer.places, dtype, written)
    config = build.hf_config(recipe)
    if recipe.heads == "critic":
        return {name: piece for name, piece in pieces.items() if name != TENSOR}, as_causal(config)
    return pieces, config


def export(trainer: Trainer, target: Path, beside: Callable[[Path], None] | None = None) -> None:
    """Write the model to `target`, in place of what was there; `beside` adds what is about it. A collective."""
    written = build.DTYPES[trainer.recipe.run.export_dtype]
    pieces, config = plain(trainer, written)
    files = ModelFiles(config, trainer.recipe.model.tokenizer_dir)
    trainer.saver.export(target, pieces, written, files, beside)


def export_adapter(trainer: Trainer, target: Path) -> None:
    """Write a LoRA run's adapters alone, as PEFT has them. A collective."""
    written = build.DTYPES[trainer.recipe.run.export_dtype]
    trainer.zero.settle()
    pieces = weight_pieces(trainer.decoder, trainer.places, trainer.zero.dtype, written)
    trainer.saver.export(target, pieces, written)
