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
        held = [row["eval"] for row in rows_of(whole) if "eval" in row]
        assert held and all(it["low"] - 1e-6 <= it["reward"] <= it["high"] + 1e-6 for it in held)
    run_and_die(recipe, tmp_path / name, 3)
    assert run_here(recipe, run__output=str(tmp_path / name)) == 0
    expected, found = outcome(whole), outcome(tmp_path / name)
    assert expected.keys() == found.keys()
    for key in expected:
        assert expected[key] == found[key], f"{name}: {key} differs"


def test_rewards_that_go_wrong_are_named_and_counted_and_the_run_lives(folder: Path, tmp_path: Path, capsys) -> None:
    recipe, here = tmp_path / "bad.toml", Path(__file__).with_name("bad_rewards.py")
    text = (folder / "grpo.toml").read_text()
    for name in ("raises", "hangs", "not_a_number", "some"):
        text += f'\n[[rewards]]\nkind = "function"\nname = "{name}"\npath = "{here}:{name}"\ntimeout = 1.5\n'
    recipe.write_text(text)
    assert run_here(recipe, run__output=str(tmp_path / "bad"), schedule__steps=2) == 0
    steps = [row for row in rows_of(tmp_path / "bad") if "loss" in row]
    assert len(steps) == 2
    for row in steps:
        counts = {name: row[f"faults.{name}"] for name in ("raises", "hangs", "not_a_number", "some", "length")}
        assert counts == {"raises": 16.0, "hangs": 16.0, "not_a_number": 16.0, "some": 0.0, "length": 0.0}
        assert "rewards.some" in row and "rewards.raises" not in row
    said = capsys.readouterr().out
    for word in ("'raises'", "I do not like this batch", "'hangs'", "'not_a_number'"):
        assert word in said, word


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_on_policy_to_the_bit_while_the_engine_is_pressed(folder: Path, tmp_path: Path, dtype: str) -> None:
    """Prompts in chunks, found prefixes and preempted answers: the trainer's log-probabilities all the same."""
    run = tmp_path / dtype
    assert run_here(folder / "grpo.toml", run__output=str(run), model__dtype=dtype, rollout__num_blocks=9) == 0
    steps = [row for row in rows_of(run) if "loss" in row]
    assert len(steps) == STEPS and all(row["kl"] == 0.0 and row["equal"] == 1.0 for row in steps)
    assert sum(row["preemptions"] for row in steps) > 0
    assert sum(row["cached_tokens"] for row in steps) > 0


@pytest.mark.parametrize("name", ["grpo", "ppo", "dpo"])
def test_adapters_are_aligned_and_the_base_is_their_reference(folder: Path, tmp_path: Path, name: str) -> None:
    run = tmp_path / name
    assert run_here(folder / f"{name}.toml", run__output=str(run), lora__rank=4) == 0
    steps = [row for row in rows_of(run) if "loss" in row]
    assert len(steps) == STEPS
    if name != "dpo":
        assert all(row["kl"] == 0.0 and row["equal"] == 1.0 for row in steps)
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    again = tmp_path / "again" / name
    run_and_die(folder / f"{name}.toml", again, 3, lora__rank=4)
    assert run_here(folder / f"{name}.toml", run__output=str(again), lora__rank=4) == 0
    assert outcome(again) == outcome(run)


@pytest.mark.parametrize("how", ["overlap", "int8"])
@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_rollouts_of_a_process_apart_are_corrected_and_resumed(
    folder: Path, tmp_path: Path, name: str, how: str
) -> None:
    """One step ahead, or quantized: how far they are from the trainer is told, and a killed run has the same bits."""
    apart = {"rollout__overlap": True} if how == "overlap" else {"rollout__quantization": "int8"}
    changes = apart | {"correction__level": "token", "correction__high": 2.0}
    recipe, run, again = folder / f"{name}.toml", tmp_path / name, tmp_path / "again" / name
    assert run_here(recipe, run__output=str(run), **changes) == 0
    steps = [row for row in rows_of(run) if "loss" in row]
    assert len(steps) == STEPS and all(0.0 <= row["masked"] <= 1.0 and row["largest_ratio"] >= 1.0 for row in steps)
    far = [row["mismatch"] > 0.0 for row in steps]
    assert all(far) if how == "int8" else not far[0] and all(far[2:])
    run_and_die(recipe, again, 3, **changes)
    assert run_here(recipe, run__output=str(again), **changes) == 0
    assert outcome(again) == outcome(run)


def test_answers_of_several_turns_learn_the_models_own_tokens_alone(folder: Path, tmp_path: Path) -> None:
    """A tool speaks behind every "e" and "a"; what it says is in the answer, and is not the policy's."""
    run, turn = tmp_path / "turns", f"{Path(__file__).with_name('bad_rewards.py')}:tool"
    changes = {"rollout__turn": turn, "rollout__stop": ["e", "a"], "rollout__max_tokens": 24}
    assert run_here(folder / "grpo.toml", run__output=str(run), schedule__steps=2, **changes) == 0
    rows = rows_of(run)
    steps = [row for row in rows if "loss" in row]
    assert all(row["kl"] == 0.0 and row["equal"] == 1.0 for row in steps)
    answers = [it for row in rows if "rollouts" in row for it in row["rollouts"]]
    spoken = [it for it in answers if "[tool]" in it["text"]]
    assert spoken and all(it["tokens"] <= 24 - len("[tool]") * it["text"].count("[tool]") // 6 for it in spoken)
