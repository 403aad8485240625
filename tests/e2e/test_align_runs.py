"""Every algorithm from recipe to model: it learns what it is to learn, and a killed run ends with the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
from align_recipe import RECIPES, STEPS, outcome, rows_of, run_and_die, run_here, write_recipes


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_recipes(tmp_path_factory.mktemp("align"))


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_killed_run_ends_with_the_same_bits(folder: Path, tmp_path: Path, name: str) -> None:
    recipe = folder / f"{name}.toml"
    assert run_here(recipe) == 0
    whole = folder / name
    steps = [row for row in rows_of(whole) if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
    assert (whole / "model" / "model.safetensors").is_file()
    if name in ("grpo", "dapo", "ppo"):
        assert all(row["kl"] == 0.0 and row["equal"] == 1.0 for row in steps)
        assert all("rewards.length" in row and "clipped" in row for row in steps)
        assert sum("rollouts" in row for row in rows_of(whole)) == STEPS
    run_and_die(recipe, tmp_path / name, 3)
    assert run_here(recipe, run__output=str(tmp_path / name)) == 0
    expected, found = outcome(whole), outcome(tmp_path / name)
    assert expected.keys() == found.keys()
    for key in expected:
        assert expected[key] == found[key], f"{name}: {key} differs"
