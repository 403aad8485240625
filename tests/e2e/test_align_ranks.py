"""Alignment on two ranks: the rewards and losses of one process at every stage of ZeRO; kills and signals."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from align_recipe import outcome, rows_of, run_here, write_recipes
from ranks import Run

from twofold.train.trainer import STOPPED

SHORT = {"schedule__steps": 4, "optimizer__lr": 3e-4}
"""So few and small steps that a difference in the last bits of the weights does not yet tip a draw."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = write_recipes(tmp_path_factory.mktemp("align"))
    for name in ("grpo", "ppo", "dpo", "reward"):
        assert run_here(folder / f"{name}.toml", **SHORT) == 0
    return folder


def begin(folder: Path, name: str, output: Path, **changes: object) -> Run:
    more = {key.replace("__", "."): value for key, value in changes.items()}
    return Run(folder / f"{name}.toml", 2, {"run.output": str(output), **more}, aligns=True)


def finish(run: Run) -> None:
    assert run.end() == [0, 0], run.said(0) + run.said(1)


@pytest.mark.parametrize(
    ("name", "zero"), [("grpo", 1), ("grpo", 2), ("grpo", 3), ("ppo", 3), ("dpo", 3), ("dpo", 0), ("reward", 3)]
)
def test_two_ranks_do_what_one_process_does(folder: Path, tmp_path: Path, name: str, zero: int) -> None:
    finish(begin(folder, name, tmp_path / name, parallel__zero=zero, **SHORT))
    alone, both = ([row for row in rows_of(run) if "loss" in row] for run in (folder / name, tmp_path / name))
    assert len(alone) == len(both)
    for one, two in zip(alone, both, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5, abs=1e-5)
        for key in ("reward", "length", "accuracy", "kl", "equal"):
            assert two.get(key) == one.get(key), f"step {one['step']}: {key}"
    answers = [
        [row["rollouts"] for row in rows_of(run) if "rollouts" in row] for run in (folder / name, tmp_path / name)
    ]
    texts = [[[it["text"] for it in step] for step in run] for run in answers]
    assert texts[0] == texts[1]


def test_a_killed_rank_and_a_signal_leave_no_trace(folder: Path, tmp_path: Path) -> None:
    """Two ranks with ZeRO 3, of which one is killed, then both are told to stop, end as two that nobody touched."""
    finish(begin(folder, "grpo", tmp_path / "whole" / "grpo", parallel__zero=3))
    output = tmp_path / "grpo"
    first = begin(folder, "grpo", output, parallel__zero=3)
    first.until(3)
    first.kill(1)
    assert first.end()[1] == -signal.SIGKILL
    second = begin(folder, "grpo", output, parallel__zero=3)
    second.until(5)
    second.kill(how=signal.SIGTERM)
    assert set(second.end()) <= {STOPPED, 0}
    finish(begin(folder, "grpo", output, parallel__zero=3))
    expected, found = outcome(tmp_path / "whole" / "grpo"), outcome(output)
    assert expected.keys() == found.keys()
    for key in expected:
        assert expected[key] == found[key], f"{key} differs"


def test_a_reward_that_hangs_on_one_rank_costs_its_share(folder: Path, tmp_path: Path) -> None:
    here = Path(__file__).with_name("bad_rewards.py")
    table = f'\n[[rewards]]\nkind = "function"\nname = "half"\npath = "{here}:hangs_on_rank_1"\ntimeout = 1.5\n'
    (folder / "half.toml").write_text((folder / "grpo.toml").read_text() + table)
    finish(begin(folder, "half", tmp_path / "half", schedule__steps=2))
    steps = [row for row in rows_of(tmp_path / "half") if "loss" in row]
    assert [(row["faults.half"], row["rewards.half"]) for row in steps] == [(8.0, 1.0)] * 2


def test_a_signal_to_all_ranks_gives_a_long_step_up(folder: Path, tmp_path: Path) -> None:
    run = begin(folder, "grpo", tmp_path / "long", data__prompts_per_step=6000, parallel__zero=3)
    listening = [Path(f"/proc/{rank.pid}/status") for rank in run.ranks]
    ends = time.monotonic() + 60
    while not all(_handles(signal.SIGTERM, status) for status in listening):
        assert time.monotonic() < ends, run.said()
        time.sleep(0.05)
    time.sleep(1.0)
    began = time.monotonic()
    run.kill(how=signal.SIGTERM)
    assert run.end() == [STOPPED, STOPPED], run.said() + run.said(1)
    assert time.monotonic() - began < 15
    assert "no step was done yet" in run.said()


def _handles(number: int, status: Path) -> bool:
    (caught,) = (line.split()[1] for line in status.read_text().splitlines() if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (number - 1) & 1)
