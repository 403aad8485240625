"""A run of many ranks goes back to a checkpoint in the memory that it has, and does the same steps again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from test_saver import assembled
from test_zero import batch
from world import run_ranks

from twofold.core import TwofoldError
from twofold.parallel import ParallelConfig
from twofold.train.checkpoint import Position
from twofold.train.rewind import rewind
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


def test_all_ranks_go_past_the_same_batches(tmp_path: Path) -> None:
    told = run_ranks(2, _past, tmp_path)
    assert told[0] == told[1]
    (step, passed, rewinds), again, fault = told[0]
    assert (step, passed, rewinds) == (0, 3, 1)
    alone = assembled(0, 1, ParallelConfig(), tmp_path / "alone")
    assert again == pytest.approx(alone.step(batch(3)).loss, abs=1e-6), "the first weights, and another batch"
    assert "elastic.max_rewinds = 3 times" in fault


def _past(rank: int, folder: Path) -> tuple[tuple[int, int, int], float, str]:
    trainer = assembled(rank, 2, ParallelConfig(zero=3), folder)
    trainer.saved_at = -1
    trainer.save()
    _steps(trainer, 0, 2)
    rewind(trainer, "it diverged")
    found = trainer.position
    assert found.batch == 3, "batch 2 was at fault"
    again = trainer.step(batch(found.batch)).loss
    trainer.position = replace(found, rewinds=3)
    try:
        rewind(trainer, "it diverged")
    except TwofoldError as error:
        trainer.mesh.wait()
        return (found.step, found.passed, found.rewinds), again, str(error)
    raise AssertionError("it went back once more")


def _steps(trainer: Trainer, first: int, last: int) -> list[float]:
    told = []
    for step in range(first, last):
        told.append(trainer.step(batch(step)).loss)
        trainer.position = Position(step=step + 1)
    return told
