"""Exports: a run's weights as a model that others read, whatever the run has beside it.

language, reward     the model as the run has it
critic               without the value head, which only the run needs
lora                 run.output/adapter as PEFT has it, and the model with the adapters added
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..models.scoring import TENSOR, as_causal
from . import adapters, build
from .files import ModelFiles
from .state import weight_pieces

if TYPE_CHECKING:
    from .trainer import Trainer


def export(trainer: Trainer, target: Path, beside: Callable[[Path], None] | None = None) -> None:
    """Write the model to `target`, in place of what was there; `beside` adds what is about it. A collective."""
    recipe = trainer.recipe
    dtype, written = trainer.zero.dtype, build.DTYPES[recipe.run.export_dtype]
    trainer.zero.settle()
    if recipe.lora is None:
        pieces = weight_pieces(trainer.decoder, trainer.places, dtype, written)
    else:
        pieces = adapters.merged_pieces(trainer.decoder, trainer.places, dtype, written)
    files = build.model_files(recipe)
    if recipe.heads == "critic":
        pieces = {name: piece for name, piece in pieces.items() if name != TENSOR}
        files = ModelFiles(as_causal(build.hf_config(recipe)), recipe.model.tokenizer_dir)
    trainer.saver.export(target, pieces, written, files, beside)


def export_adapter(trainer: Trainer, target: Path) -> None:
    """Write a LoRA run's adapters alone, as PEFT has them. A collective."""
    written = build.DTYPES[trainer.recipe.run.export_dtype]
    trainer.zero.settle()
    pieces = weight_pieces(trainer.decoder, trainer.places, trainer.zero.dtype, written)
    trainer.saver.export(target, pieces, written)
