"""Alignment where there is nothing to learn from, where numbers end, and where a run is killed between two files."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import bad_rewards
import pytest
from align_recipe import outcome, rows_of, run_here, write_recipes
from ranks import Run

from twofold.align.run import align, where
from twofold.core import ConfigError, TwofoldError
from twofold.train import launch
from twofold.train.export import export

ALIKE = """
def alike(completions, **given):
    return [1.0] * len(completions)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_recipes(tmp_path_factory.mktemp("align"))


def judged_by(folder: Path, recipe: str, function: str, place: Path) -> Path:
    """A recipe with one reward: a function of a file."""
    head, rest = (folder / f"{recipe}.toml").read_text().split("[[rewards]]")
    reward = f'[[rewards]]\nkind = "function"\nname = "{function}"\npath = "{place}:{function}"\n'
    path = folder / f"{recipe}-{function}.toml"
    path.write_text(head + reward + rest[rest.index("[grpo]") :])
    return path


def strict(path: Path) -> list[dict[str, object]]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_prompts_whose_answers_are_all_worth_the_same_teach_dapo_nothing(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "alike.py").write_text(ALIKE)
    recipe, run = judged_by(folder, "dapo", "alike", tmp_path / "alike.py"), tmp_path / "run"
    assert run_here(recipe, run__output=str(run), schedule__steps=2) == 0
    skipped = [row for row in strict(run / "log.jsonl") if "skipped" in row]
    assert [row["step"] for row in skipped] == [1, 2]
    assert all(row["reward"] == 1.0 and row["faults.alike"] == 0.0 for row in skipped)


def test_a_reward_that_fails_all_the_time_is_counted_and_the_run_ends_with_what_to_look_at(
    folder: Path, tmp_path: Path
) -> None:
    recipe = judged_by(folder, "grpo", "raises", Path(__file__).with_name("bad_rewards.py"))
    run = tmp_path / "run"
    with pytest.raises(TwofoldError, match=r"3 steps in a row .* no rollout has a reward .* what judges it"):
        run_here(recipe, run__output=str(run), run__eval_every=1, optimizer__max_skips=3)
    rows = strict(run / "log.jsonl")
    assert [row["faults.raises"] for row in rows if "skipped" in row] == [16.0, 16.0, 16.0]
    assert all("reward" not in row["eval"] and row["eval"]["faults.raises"] > 0 for row in rows if "eval" in row)


def test_a_reward_model_whose_numbers_end_is_told_of_and_its_run_goes_on(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert run_here(folder / "reward.toml", run__output=str(run), optimizer__lr=1e30) == 0
    rows = strict(run / "log.jsonl")
    assert "loss" in rows[0] and "not finite" in rows[1]["skipped"]


def test_a_correction_is_taken_where_bits_need_not_agree(folder: Path, tmp_path: Path) -> None:
    changes = {"rollout__exact": False, "correction__level": "token", "schedule__steps": 1}
    for name in ("grpo", "ppo"):
        run = tmp_path / name
        assert run_here(folder / f"{name}.toml", run__output=str(run), **changes) == 0
        (row,) = (row for row in rows_of(run) if "loss" in row)
        assert (row["masked"], row["largest_ratio"], row["kl"], row["equal"]) == (0.0, 1.0, 0.0, 1.0)


def test_a_run_killed_before_its_model_is_written_still_leaves_the_average(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run is known to be finished by its model: all else that it leaves is there first."""
    whole, run = tmp_path / "whole" / "ppo", tmp_path / "ppo"
    assert run_here(folder / "ppo.toml", run__output=str(whole), schedule__steps=2) == 0
    assert (whole / "model-average" / "model.safetensors").is_file()

    def dies(trainer, target, beside=None) -> None:
        export(trainer, target, beside)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(launch, "export", dies)
        run_here(folder / "ppo.toml", run__output=str(run), schedule__steps=2)
    assert run_here(folder / "ppo.toml", run__output=str(run), schedule__steps=2) == 0
    expected, found = outcome(whole), outcome(run)
    assert expected.keys() == found.keys()
    for key in expected:
        assert expected[key] == found[key], f"{key} differs"


def test_a_tools_text_in_a_chat_is_a_message_of_the_template(folder: Path, tmp_path: Path) -> None:
    """Prompts that are texts are chats in a chat recipe, and so is what a tool says behind an answer to one."""
    (tmp_path / "tool.py").write_text("def says(prompt, messages):\n    return 'fox' if len(messages) < 2 else None\n")
    run = tmp_path / "run"
    changes = {"kind": "chat", "rollout__turn": f"{tmp_path}/tool.py:says", "rollout__max_tokens": 40}
    changes |= {"data__seq_len": 96, "schedule__steps": 1, "rollout__shown": 99, "rollout__stop": ("a", "e", " ")}
    assert run_here(folder / "grpo.toml", run__output=str(run), data__max_prompt=56, **changes) == 0
    (row,) = (row for row in rows_of(run) if "loss" in row)
    assert (row["kl"], row["equal"]) == (0.0, 1.0)
    texts = [it["text"] for row in rows_of(run) if "rollouts" in row for it in row["rollouts"]]
    assert sum("tool\nfox\nassistant\n" in text for text in texts) > len(texts) / 2


def test_alignment_from_python_goes_on_with_the_same_rows(folder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"def f{n}(a):\n", "wanted": "a"} for n in range(6)]
    tables = tomllib.loads((folder / "grpo.toml").read_text())
    tables["run"]["output"], tables["schedule"]["steps"] = str(tmp_path / "run"), 2
    found = align(tables, rows=rows, rewards=[bad_rewards.some, {"kind": "python_parses", "weight": 0.5}])
    assert found.finished and (found.model / "model.safetensors").is_file()
    steps = [row for row in found.rows if "loss" in row]
    assert len(steps) == 2 and {"rewards.some", "rewards.python_parses", "rewards.length"} <= steps[0].keys()
    again = align(tables, rows=rows, rewards=[bad_rewards.some, {"kind": "python_parses", "weight": 0.5}])
    assert again.rows == found.rows  # nothing was left to do
    assert "rewards" in tables and len(tables["rewards"]) == 1  # the caller's own are as they were
    with pytest.raises(ConfigError, match=r"run holds a run of another recipe: .*train"):
        align(tables, rows=rows[:5], rewards=[bad_rewards.some, {"kind": "python_parses", "weight": 0.5}])


@pytest.mark.parametrize("function", [lambda **given: [], print, "here"])
def test_a_function_that_no_other_process_finds_is_refused(tmp_path: Path, function: object) -> None:
    def here() -> None: ...

    with pytest.raises(ConfigError, match="at its top level"):
        where(here if function == "here" else function)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "key"), [("grpo", "prompts_per_step"), ("ppo", "prompts_per_step"), ("dpo", "pairs_per_step")]
)
def test_a_rank_that_has_nothing_to_do_waits_for_the_other(folder: Path, tmp_path: Path, name: str, key: str) -> None:
    """One prompt, or one pair, for two ranks: the numbers of one process."""
    alone, both = tmp_path / "alone", tmp_path / "both"
    assert run_here(folder / f"{name}.toml", run__output=str(alone), schedule__steps=2, **{f"data__{key}": 1}) == 0
    changes = {"run.output": str(both), "schedule.steps": 2, f"data.{key}": 1, "parallel.zero": 3}
    ranks = Run(folder / f"{name}.toml", 2, changes, aligns=True)
    assert ranks.end() == [0, 0], ranks.said(0) + ranks.said(1)
    one, two = ([row for row in rows_of(run) if "loss" in row] for run in (alone, both))
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-5, abs=1e-5)
    assert [row.get("reward") for row in two] == [row.get("reward") for row in one]
