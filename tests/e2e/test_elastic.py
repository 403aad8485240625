"""Runs that lose ranks, machines and time go on by themselves, with the losses of one that lost nothing."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import pytest
from ranks import read_losses
from tiny_recipe import write_recipe
from torchrun import Agent, until

from twofold.train import launch

STEPS = 60
SHORT = {"schedule.steps": STEPS, "run.save_every": 10, "run.eval_every": 1000, "sample.prompts": []}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def alone(recipe: Path) -> list[float]:
    """The losses of one undisturbed process."""
    run = recipe.parent / "alone"
    assert launch.run(recipe, SHORT | {"run.output": str(run)}) == 0
    return read_losses(run)


def close(output: Path, losses: list[float]) -> None:
    assert read_losses(output) == pytest.approx(losses, rel=1e-6, abs=1e-6)


def test_a_killed_rank_starts_again(recipe: Path, alone: list[float], tmp_path: Path) -> None:
    run = tmp_path / "run"
    agent = Agent(recipe, SHORT | {"run.output": run}, tmp_path / "said")
    for rank, step in (1, 12), (0, 33):
        until(agent, run, step)
        os.kill(agent.ranks()[rank], signal.SIGKILL)
    assert agent.end() == 0, agent.said()
    assert agent.said().count("going on from step-") == 2
    close(run, alone)


def test_machines_leave_and_join(recipe: Path, alone: list[float], tmp_path: Path) -> None:
    """Two agents, one of them killed with its ranks, and one more that joins: the batches are the same."""
    run = tmp_path / "run"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    changes = SHORT | {"run.output": run, "schedule.steps": STEPS}
    stays = Agent(recipe, changes, tmp_path / "stays", ranks=1, elastic=(port, True))
    leaves = Agent(recipe, changes, tmp_path / "leaves", ranks=1, elastic=(port, False))
    until(stays, run, 12)
    leaves.kill()
    assert stays.end() == 0, stays.said()
    assert "2 ranks" in stays.said() and "going on from step-" in stays.said()
    close(run, alone)
