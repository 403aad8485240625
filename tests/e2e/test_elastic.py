"""Runs that lose ranks, machines and time go on by themselves, with the losses of one that lost nothing."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from ranks import read_losses
from tiny_recipe import write_recipe
from torchrun import Agent, last_step, until

from tests.ports import free_port
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
        until(agent, run, step, saved=step // 10 * 10)
        os.kill(agent.ranks()[rank], signal.SIGKILL)
    assert agent.end() == 0, agent.said()
    assert agent.said().count("going on from step-") == 2
    close(run, alone)


def test_machines_join_and_leave(recipe: Path, alone: list[float], tmp_path: Path) -> None:
    """An agent alone, a second that joins, and is killed with its rank: the batches are the same."""
    run = tmp_path / "run"
    port = free_port()
    changes = SHORT | {"run.output": run, "elastic.max": 2}
    stays = Agent(recipe, changes, tmp_path / "stays", ranks=1, elastic=(port, True), paced=(0.2, "well"))
    until(stays, run, 3)
    joins = Agent(recipe, changes, tmp_path / "joins", ranks=1, elastic=(port, False), paced=(0.2, "well"))
    until(stays, run, 3, what="2 ranks (shard 2", other=joins)
    until(stays, run, last_step(run) + 3, other=joins)
    joins.kill()
    assert stays.end() == 0, stays.said()
    said = stays.said()
    assert "1: 2 x 2, 2: 1 x 2" in said and said.count("2 ranks (shard 2, ZeRO 2)") == 1
    assert "SIGTERM: saved at step " in said, "by torchrun, for the one that joins"
    assert said.count("going on from step-") >= 2
    close(run, alone)


def test_any_rank_that_is_told_to_stop_stops_all(recipe: Path, alone: list[float], tmp_path: Path) -> None:
    """Both save together and end with 75, and the same command goes on."""
    run = tmp_path / "run"
    changes = SHORT | {"run.output": run}
    agent = Agent(recipe, changes, tmp_path / "first", paced=(0.05, "well"), restarts=0)
    until(agent, run, 5)
    os.kill(agent.ranks()[1], signal.SIGTERM)
    assert agent.end() != 0
    said = agent.said()
    assert said.count("another rank was told to stop: saved at step ") == 1
    assert "exitcode  : 75" in said
    agent = Agent(recipe, changes, tmp_path / "second")
    assert agent.end() == 0, agent.said()
    assert "going on from step-" in agent.said()
    close(run, alone)


@pytest.mark.parametrize("what", ["sleeps", "strays"])
def test_a_hang_is_reported_and_the_run_goes_on(recipe: Path, alone: list[float], tmp_path: Path, what: str) -> None:
    run = tmp_path / "run"
    changes = SHORT | {"run.output": run, "elastic.heartbeat": 2.0, "run.save_every": 5}
    agent = Agent(recipe, changes, tmp_path / "said", paced=(0.0, what))
    assert agent.end() == 0, agent.said()
    said = agent.said()
    assert said.count("the run hangs: rank ") == 1 and "(exitcode: 76)" in said
    (report,) = run.glob("hang/*/report.txt")
    told = report.read_text()
    assert told in said and "rank 0: the pass of step 8 for" in told and "rank 1: the pass of step 8 for" in told
    if what == "sleeps":
        assert "to which rank 1 has not come" in told and "time.sleep(600)" in told
    else:
        assert "rank 1 is at all_reduce #" in told and " [3] fp64 on zero, rank 0 at all_gather #" in told
    assert "going on from step-00000005" in said
    close(run, alone)
