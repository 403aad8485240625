"""The recipes that align the bundled model take their first steps, as they stand but for how much a step reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from align_recipe import rows_of, run_here

from benchmarks import held_out
from twofold.align.config import AlignRecipe
from twofold.commands.model import bundled_model
from twofold.core import load_config

PLAYS: dict[str, Any] = {"data__prompts_per_step": 4, "data__eval_prompts": 4}
SMALLER: dict[str, dict[str, Any]] = {
    "sft": {"data__train": ["recipes/pybot/demonstrations.train.jsonl"], "data__tokens_per_step": 256},
    "reward": {"data__pairs_per_step": 2},
    "dpo": {"data__pairs_per_step": 2},
    "ppo": PLAYS | {"data__text": ["recipes/pybot/pairs.py"], "data__tokens_per_step": 256},
    "grpo": PLAYS | {"grpo__group": 2},
}
MOVED = {"sft": "loss", "reward": "accuracy", "dpo": "margin", "ppo": "reward", "grpo": "reward"}
"""What each recipe is to move, and so must measure on what is held out."""


def recipe(name: str) -> Path:
    return Path("recipes/pybot") / f"{name}.toml"


@pytest.mark.parametrize("name", sorted(SMALLER))
def test_it_takes_two_steps(name: str, tmp_path: Path) -> None:
    less = {"run__threads": 1, "run__eval_every": 2, "run__eval_batches": 1, "schedule__warmup": 1, "run__log_every": 1}
    assert run_here(recipe(name), run__output=str(tmp_path), schedule__steps=2, **less, **SMALLER[name]) == 0
    rows = rows_of(tmp_path)
    steps = [row for row in rows if "loss" in row and "grad_norm" in row]
    assert [row["step"] for row in steps] == [1, 2]
    assert all(row["grad_norm"] > 0 for row in steps)
    if name in ("ppo", "grpo"):
        assert all(row["kl"] == 0.0 and row["equal"] == 1.0 for row in steps)
    told = [row.get("eval", row) for row in rows if "eval" in row or "valid_loss" in row]
    assert any(MOVED[name] in row or "valid_loss" in row for row in told), rows
    assert (tmp_path / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", sorted(SMALLER))
def test_it_begins_with_the_base_and_measures_on_other_prompts(name: str) -> None:
    found = load_config(AlignRecipe, recipe(name))
    assert found.algorithm == name and str(found.model.from_) == "recipes/pybot/base"
    assert found.data.valid and not set(found.data.valid) & set(found.data.train)
    assert str(found.run.output) == f"runs/pybot/{name}"


def test_what_is_still_known_is_measured_document_by_document() -> None:
    found = held_out.measure(bundled_model(), "recipes/pybot/demonstrations.valid.jsonl", 12)
    (name,) = found
    assert len(found[name]) == 12 and all(3.0 < loss < 12.0 for loss in found[name])
    same = held_out.compare(found, found)[name]
    assert same["less"] == {"value": 0.0, "low": 0.0, "high": 0.0} and same["verdict"] == "not shown"
    worse = held_out.compare({name: [loss + 0.5 for loss in found[name]]}, found)[name]
    assert worse["less"]["value"] == -0.5 and worse["verdict"] == "worse"
