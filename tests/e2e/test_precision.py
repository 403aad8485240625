"""Other optimizers and number formats through the door: they train, and killed and run again end with the same bits."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from tiny_recipe import bits, kill_after, write_recipe

from twofold.train import checkpoint, launch
from twofold.train.journal import read_rows

FP16 = ("model.dtype=fp16", "fp16.initial_scale_power=22", "fp16.hysteresis=1", "fp16.loss_scale_window=5")
MUON = ("optimizer.name=muon", "optimizer.lr=0.02", "optimizer.adamw_lr=0.01", "schedule.kind=wsd")


def run_here(recipe: Path, output: Path, changes: tuple[str, ...]) -> tuple[int, str]:
    """Its exit status and all that it said."""
    said = io.StringIO()
    overrides = dict(change.split("=", 1) for change in (f"run.output={output}", *changes))
    return launch.run(recipe, overrides, console=Console(file=said, width=200)), said.getvalue()


@pytest.mark.parametrize("changes", [FP16, MUON], ids=["fp16", "muon"])
def test_killed_and_resumed_it_ends_with_the_same_bits(changes: tuple[str, ...], tmp_path: Path) -> None:
    recipe, whole, killed = write_recipe(tmp_path), tmp_path / "whole" / "run", tmp_path / "killed" / "run"
    assert run_here(recipe, whole, changes)[0] == 0
    rows = read_rows(whole / "log.jsonl")
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    assert losses[24] < 0.8 * losses[min(losses)]
    if changes == FP16:
        overflows = [row for row in rows if "skipped" in row]
        assert overflows and all("first in " in row["skipped"] for row in overflows), rows
        assert f"(batch {overflows[0]['step'] - 1}), at loss scale 4.1943e+06" in overflows[0]["skipped"]
        scales = [row["loss_scale"] for row in rows if "loss" in row]
        assert max(scales) > min(scales), "the scale should have grown again"
    step = next(step for step in (12, 13, 14, 16, 17) if step in losses)
    kill_after(recipe, killed, step, *changes)
    status, said = run_here(recipe, killed, changes)
    assert status == 0 and f"going on from step-{step // 5 * 5:08d}" in said, said
    expected, found = bits(whole), bits(killed)
    assert expected.keys() == found.keys()
    assert [name for name in expected if expected[name] != found[name]] == []


def test_a_run_from_before_there_was_a_choice_of_optimizers_goes_on(tmp_path: Path) -> None:
    """Keys that its trainer did not know were at their defaults."""
    recipe = write_recipe(tmp_path)
    assert launch.run(recipe, {"schedule.steps": 5}) == 0
    newest = tmp_path / "run" / "checkpoints" / "step-00000005"
    position = json.loads((newest / "trainer.json").read_text())
    new = ("optimizer.name", "optimizer.momentum", "schedule.kind", "fp16.hysteresis", "optimizer.trust")
    assert all(position["recipe"].pop(key, "") != "" for key in new)
    del position["scaler"]
    (newest / "trainer.json").write_text(json.dumps(position))
    checkpoint.seal(newest)
    assert launch.run(recipe, {"schedule.steps": 5}) == 0
