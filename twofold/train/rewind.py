"""Rewind: a run that diverged goes back to a checkpoint and past the batches since (as PaLM's did by hand, 2022).

    steps     1 2 3 | 4 5 6 7*     7 is a spike; | is the checkpoint of step 3
    batches   0 1 2 | 3 4 5 6
    then              4 5 6 ...    the same steps
                      7 8 9 ...    other batches

What it goes back to is a function of the recipe: the newest checkpoint of a multiple of `run.save_every`, not one that
a signal made. A run that is killed behind a rewind meets the same spike again, and goes back again.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ..core import TwofoldError
from .lesson import named
from .spikes import Spikes
from .state import go_back

if TYPE_CHECKING:
    from .trainer import Trainer


def rewind(trainer: Trainer, why: str) -> None:
    """Take `trainer` back to the newest regular checkpoint, and on from the batch behind the one at fault.

    Raises:
        TwofoldError: it has gone back to this checkpoint too often, or there is none.
    """
    at, recipe, saver = trainer.position, trainer.recipe, trainer.saver
    most = recipe.elastic.max_rewinds
    if at.rewinds == most:
        raise TwofoldError(
            f"{why}: the run went back to one checkpoint elastic.max_rewinds = {most} times already; lower "
            "optimizer.lr, or look at the documents that log.jsonl names"
        )
    saver.wait()
    trainer.zero.settle()
    found, notes = saver.checkpoints.latest(trainer.mesh.group("world"), recipe.run.save_every)
    if found is None:
        raise TwofoldError(f"{why}: there is no checkpoint to go back to")
    back = go_back(found, trainer.decoder, trainer.places, trainer.optimizer, trainer.mesh)
    trainer.optimizer.offload.settle()
    trainer.scaler.load(back.scaler)
    trainer.spikes = Spikes(recipe.elastic, back.recent)
    trainer.position = replace(back, passed=at.batch + 1 - back.step, rewinds=at.rewinds + 1)
    trainer.saved_at = back.step
    past = [back.batch, at.batch]
    trainer.journal.rewind(back.step)
    trainer.journal.add(
        back.step + 1, rewound=why, spiked=at.step + 1, passed=past, **named(trainer.data.train, at.batch)
    )
    for note in notes:
        trainer.display.say(note)
    trainer.display.say(f"step {at.step + 1}: {why}; back to {found.name}, past batches {past[0]} to {past[1]}")
