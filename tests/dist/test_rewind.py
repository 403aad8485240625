"""A run of many ranks goes back to a checkpoint in the memory that it has, and does the same steps again."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_saver import assembled
from test_zero import batch
from world import run_ranks

from twofold.parallel import ParallelConfig
from twofold.train.checkpoint import Position
from twofold.train.state import go_back
from twofold.train.trainer import Trainer


@pytest.mark.parametrize(
    ("world", "parallel", "dtype"),
    [
        (1, ParallelConfig(), "bf16"),
        (2, ParallelConfig(zero=3), "fp32"),
        (2, ParallelConfig(zero=1), "bf16"),
        (2, ParallelConfig(tp=2), "fp32"),
        (2, ParallelConfig(pp=2), "fp32"),
    ],
    ids=["alone bf16", "zero 3", "zero 1 bf16", "tp", "pp"],
)
@pytest.mark.parametrize("saved", [0, 2])
def test_the_same_steps_again(tmp_path: Path, world: int, parallel: ParallelConfig, dtype: str, saved: int) -> None:
    work = (world, parallel, tmp_path, dtype, saved)
    told = run_ranks(world, _there_and_back, *work) if world > 1 else [_there_and_back(0, *work)]
    for first, again in told:
        assert first == again and len(set(first)) == 3


def _there_and_back(
    rank: int, world: int, parallel: ParallelConfig, folder: Path, dtype: str, saved: int
) -> tuple[list[float], list[float]]:
    trainer = assembled(rank, world, parallel, folder, dtype=dtype)
    _steps(trainer, 0, saved)
    trainer.saved_at = -1
    trainer.save()
    trainer.saver.wait()
    first = _steps(trainer, saved, saved + 3)
    trainer.zero.settle()
    found = trainer.saver.checkpoints.path(saved)
    trainer.position = go_back(found, trainer.decoder, trainer.places, trainer.optimizer, trainer.mesh)
    assert trainer.position.step == saved
    again = _steps(trainer, saved, saved + 3)
    trainer.mesh.wait()
    return first, again


def _steps(trainer: Trainer, first: int, last: int) -> list[float]:
    told = []
    for step in range(first, last):
        told.append(trainer.step(batch(step)).loss)
        trainer.position = Position(step=step + 1)
    return told
