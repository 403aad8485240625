"""Lesson: what one step of a run is made of. Reading takes the next batch; those of alignment are in `align/`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .pieces import Piece, Stored

if TYPE_CHECKING:
    from .step import Step
    from .trainer import Trainer


class GivenUp(Exception):
    """A step that all ranks leave in its middle, because one was asked to stop; nothing of it has come to be."""


class Lesson:
    """Each step reads the batch of its number, and every now and then the held-out ones are read.

    Whatever else a lesson remembers from step to step is in its `pieces`, so that a run goes on with the same bits.
    """

    curve = "loss"
    """The figure that a finished run draws on the terminal."""

    def begin(self, trainer: Trainer, stored: Stored | None) -> None:
        """Before the first step of this process; `stored` is the checkpoint that the run goes on from."""

    def step(self, trainer: Trainer) -> Step:
        """Do one step of the run; of the optimizer it may be several.

        Raises:
            GivenUp: the run is to stop (`trainer.stop.asked`), and the step has changed nothing yet.
        """
        return trainer.step(trainer.data.train.batch(trainer.position.batch))

    def examine(self, trainer: Trainer) -> None:
        """Every `run.eval_every` steps: look at what is held out, and write down what is seen."""
        if not trainer.data.valid:
            return
        value, step = trainer.evaluate(), trainer.position.step
        trainer.journal.add(step, valid_loss=value)
        trainer.display.say(f"step {step}: validation loss {value:.4f}")

    def at_fault(self, trainer: Trainer) -> dict[str, Any]:
        """What a step that was skipped had read, for the journal."""
        return named(trainer.data.train, trainer.position.batch - 1)

    def line(self, figures: dict[str, float]) -> str:
        """What the step's line on the terminal has of its figures."""
        return ""

    def pieces(self, trainer: Trainer) -> dict[str, Piece]:
        """Tensors that the next step depends on, by name; their names begin with "lesson."."""
        return {}

    def finish(self, trainer: Trainer) -> None:
        """After the last step, before the model is written: what this leaves is there when that is."""

    def close(self) -> None:
        """However the run ends."""


def named(loader: Any, batch: int) -> dict[str, Any]:
    """A batch's number, and those of its documents where the loader knows them."""
    documents = getattr(loader, "documents", None)
    return {"batch": batch} | ({"documents": documents(batch)} if documents else {})
