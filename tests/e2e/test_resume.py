"""A run that is killed, and run again, ends with the bits of one that never was."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest
from tiny_recipe import bits, finish, kill_after, start, write_recipe

from twofold.core import ConfigError
from twofold.train import launch
from twofold.train.journal import read_rows


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[Path, Path]:
    """A recipe and the run directory of its undisturbed run."""
    folder = tmp_path_factory.mktemp("undisturbed")
    recipe = write_recipe(folder)
    status, said = finish(start(recipe))
    assert status == 0, said
    assert "finished 24 steps" in said and "validation loss" in said
    return recipe, folder / "run"


def same(undisturbed: tuple[Path, Path], run: Path) -> None:
    expected, found = bits(undisturbed[1]), bits(run)
    assert expected.keys() == found.keys()
    for name in expected:
        assert expected[name] == found[name], f"{name} differs"


def test_killed_at_random_steps(undisturbed, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = random.SystemRandom().randrange(1, 12)
    second = random.SystemRandom().randrange(13, 23)
    print(f"killed at steps {first} and {second}")
    kill_after(undisturbed[0], run, first, saved=False)
    kill_after(undisturbed[0], run, second, saved=False)
    status, said = finish(start(undisturbed[0], f"run.output={run}"))
    assert status == 0, said
    newest = second // 5 * 5  # which may have been in the middle of its write
    assert any(f"going on from step-{step:08d}" in said for step in (newest - 5, newest)), said
    same(undisturbed, run)


@pytest.mark.parametrize("flush", [9, 23])
def test_killed_inside_a_checkpoints_write(undisturbed, tmp_path: Path, flush: int) -> None:
    run = tmp_path / "run"
    process = start(undisturbed[0], f"run.output={run}", die_at_flush=flush)
    finish(process)
    assert process.returncode == -signal.SIGKILL
    assert [d for d in (run / "checkpoints").iterdir() if d.name.startswith(".tmp-")] or flush == 9
    status, said = finish(start(undisturbed[0], f"run.output={run}"))
    assert status == 0 and "damaged" not in said, said
    same(undisturbed, run)
    assert not [d for d in (run / "checkpoints").iterdir() if not d.name.startswith("step-")]


def test_a_damaged_checkpoint_is_named_and_the_run_goes_on_from_the_one_before(undisturbed, tmp_path: Path) -> None:
    run = tmp_path / "run"
    kill_after(undisturbed[0], run, 13)
    weights = run / "checkpoints" / "step-00000010" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 4
    weights.write_bytes(data)
    status, said = finish(start(undisturbed[0], f"run.output={run}"))
    assert status == 0, said
    assert "step-00000010 is damaged (model.safetensors: SHA-256 does not match)" in said
    assert "going on from step-00000005" in said
    same(undisturbed, run)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_how_to_go_on(undisturbed, tmp_path: Path, number: signal.Signals) -> None:
    run = tmp_path / "run"
    process = start(undisturbed[0], f"run.output={run}")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 7/"):
            process.send_signal(number)
            break
    status, said = finish(process)
    assert status == 75, said
    assert f"{number.name}: saved at step" in said and "the same command goes on" in said
    status, said = finish(start(undisturbed[0], f"run.output={run}"))
    assert status == 0, said
    same(undisturbed, run)


def test_a_finished_run_says_so(undisturbed) -> None:
    before = bits(undisturbed[1])
    status, said = finish(start(undisturbed[0]))
    assert status == 0 and "finished, all 24 steps are done" in said
    assert bits(undisturbed[1]) == before


def test_another_recipe_is_refused_with_what_differs(undisturbed) -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.lr was 0\.01, is 0\.5; schedule\.steps was 24, is 30.*--fresh"):
        launch.run(undisturbed[0], {"optimizer.lr": 0.5, "schedule.steps": 30})


def test_changed_data_is_refused_and_fresh_starts_over(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    assert launch.run(recipe, {"schedule.steps": 6}) == 0
    (tmp_path / "run" / "checkpoints" / "step-00000006").rename(tmp_path / "gone")
    (tmp_path / "corpus" / "new.txt").write_text("One more thing.")
    with pytest.raises(ConfigError, match="training data is not what"):
        launch.run(recipe, {"schedule.steps": 6})
    assert launch.run(recipe, {"schedule.steps": 4}, fresh=True) == 0
    assert [row["step"] for row in read_rows(tmp_path / "run" / "log.jsonl") if "loss" in row] == [1, 2, 3, 4]


def test_a_directory_in_use_is_refused(undisturbed, tmp_path: Path) -> None:
    with (
        launch._alone(tmp_path),
        pytest.raises(ConfigError, match="in use by another run"),
    ):
        launch.run(undisturbed[0], {"run.output": str(tmp_path)})
