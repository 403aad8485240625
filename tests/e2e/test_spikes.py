"""Spikes and numbers that are not finite, met by each policy: what was passed over, and that it is the same again."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from tiny_recipe import write_recipe

from twofold.core import TwofoldError
from twofold.train import launch, trainer
from twofold.train.journal import read_rows
from twofold.train.objective import Objective, Sums

STEPS = 20
SHORT = {
    "schedule.steps": STEPS, "run.save_every": 5, "run.eval_every": 1000, "sample.prompts": [], "run.keep_last": 9,
    "elastic.window": 4, "elastic.spike_factor": 3.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture
def bad(monkeypatch) -> dict[int, float]:
    """Numbers of batches, and what their losses are multiplied by."""
    found: dict[int, float] = {}
    original = trainer.Trainer._pass

    def passed(self: trainer.Trainer, batch: Any, total: float, objective: Objective) -> Sums:
        sums = original(self, batch, total, objective)
        return {name: value * found.get(self.position.batch, 1.0) for name, value in sums.items()}

    monkeypatch.setattr(trainer.Trainer, "_pass", passed)
    return found


def run(recipe: Path, output: Path, policy: str, **more: Any) -> list[dict[str, Any]]:
    changes = SHORT | {"run.output": str(output), "elastic.on_spike": policy} | more
    assert launch.run(recipe, changes) == 0
    return read_rows(output / "log.jsonl")


def of(rows: list[dict[str, Any]], key: str) -> dict[int, Any]:
    return {row["step"]: row[key] for row in rows if key in row}


def test_a_spike_is_skipped(recipe: Path, tmp_path: Path, bad) -> None:
    bad |= {8: 9.0, 12: math.nan}
    rows = run(recipe, tmp_path, "skip")
    told = [row for row in rows if "skipped" in row]
    assert [(row["step"], row["batch"]) for row in told] == [(9, 8), (13, 12)]
    assert "is more than 3 times" in told[0]["skipped"] and "not finite" in told[1]["skipped"]
    assert told[0]["documents"] == sorted(set(told[0]["documents"])) and told[0]["documents"]
    assert sorted(of(rows, "loss")) == [n for n in range(1, STEPS + 1) if n not in (9, 13)]


def test_without_a_policy_a_spike_is_learned(recipe: Path, tmp_path: Path, bad) -> None:
    bad[8] = 9.0
    assert len(of(run(recipe, tmp_path, "none"), "loss")) == STEPS


@pytest.mark.parametrize("factor", [9.0, math.nan])
def test_a_run_goes_back_and_past_the_batches(recipe: Path, tmp_path: Path, bad, factor: float) -> None:
    bad[8] = factor
    rows = run(recipe, tmp_path, "rewind")
    (told,) = [row for row in rows if "rewound" in row]
    assert (told["step"], told["spiked"], told["passed"], told["batch"]) == (6, 9, [5, 8], 8)
    assert sorted(of(rows, "loss")) == list(range(1, STEPS + 1)), "every step is done"
    assert of(rows, "tokens")[STEPS] == STEPS * 256
    truth = of(run(recipe, tmp_path / "undisturbed", "none"), "loss")
    assert [of(rows, "loss")[n] for n in range(1, 6)] == [truth[n] for n in range(1, 6)]


def test_a_stopped_run_rewinds_to_the_same_bits(recipe: Path, tmp_path: Path, bad, monkeypatch) -> None:
    """Stopped before a spike and behind it, between the regular checkpoints: the losses of one that was not."""
    bad |= {8: 9.0, 16: math.nan}
    truth = of(run(recipe, tmp_path / "one", "rewind"), "loss")
    original = trainer.Trainer._advance
    for stop in (7, 7 + STEPS, 18):

        def advance(self: trainer.Trainer, clock: Any, stop: int = stop) -> None:
            original(self, clock)
            if self.position.step == stop % STEPS and (stop < STEPS or self.position.passed):
                self.save()
                self.saver.wait()
                raise KeyboardInterrupt

        monkeypatch.setattr(trainer.Trainer, "_advance", advance)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, tmp_path / "two", "rewind")
    monkeypatch.setattr(trainer.Trainer, "_advance", original)
    rows = run(recipe, tmp_path / "two", "rewind")
    assert of(rows, "loss") == truth
    assert [row["passed"] for row in rows if "rewound" in row] == [[5, 8], [14, 16]]


def test_a_run_does_not_go_back_for_ever(recipe: Path, tmp_path: Path, bad) -> None:
    bad |= dict.fromkeys(range(7, 99), math.inf)
    with pytest.raises(TwofoldError, match=r"went back to one checkpoint elastic.max_rewinds = 2 times"):
        run(recipe, tmp_path, "rewind", **{"elastic.max_rewinds": 2})
    told = [row["passed"] for row in read_rows(tmp_path / "log.jsonl") if "rewound" in row]
    assert told == [[5, 8]]
