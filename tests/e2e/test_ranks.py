"""`twofold train` on several ranks: what one process trains, killed or not, on as many ranks or on others."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import Run, read_losses
from safetensors.torch import load_file
from tiny_recipe import write_recipe
from transformers import AutoModelForCausalLM

from twofold import cli
from twofold.models import weights
from twofold.models.packed import PackedContext
from twofold.train import launch
from twofold.train.trainer import STOPPED

STEPS = 14
SHORT = {"schedule.steps": STEPS, "run.save_every": 3, "run.eval_every": 5, "sample.every": 7}
LAST = f"checkpoints/step-{STEPS:08d}"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def alone(recipe: Path) -> Path:
    """The run of one process."""
    run = recipe.parent / "alone"
    assert launch.run(recipe, SHORT | {"run.output": str(run)}) == 0
    return run


@pytest.fixture(scope="module")
def pair(recipe: Path) -> Path:
    """The undisturbed run of two ranks."""
    return finish(recipe, 2, recipe.parent / "pair").output


def begin(recipe: Path, world: int, output: Path, die: tuple[int, int] | None = None, **more) -> Run:
    changes = {key.replace("__", "."): value for key, value in more.items()}
    return Run(
        recipe, world, {**SHORT, "parallel.zero": 3, "sample.prompts": [], "run.output": str(output), **changes}, die
    )


def finish(recipe: Path, world: int, output: Path, **more) -> Run:
    run = begin(recipe, world, output, **more)
    assert run.end() == [0] * world, "\n".join(map(run.said, range(world)))
    return run


def bits(run: Path) -> dict[str, bytes]:
    """Everything that must be equal, clocks and directories left out."""
    found = {f"{d}/{f.name}": f.read_bytes() for d in (LAST, "model") for f in (run / d).iterdir()}
    del found[f"{LAST}/manifest.json"]
    for name in ("README.md", "training.json"):  # the card is of a model called as its run's directory
        found[f"model/{name}"] = found[f"model/{name}"].replace(run.name.encode(), b"run")
    found[f"{LAST}/trainer.json"] = json.dumps(json.loads(found[f"{LAST}/trainer.json"]) | {"recipe": 0}).encode()
    return found | {"losses": repr(read_losses(run)).encode()}


def same(expected: Path, run: Path) -> None:
    one, other = bits(expected), bits(run)
    assert one.keys() == other.keys()
    assert not [name for name in one if one[name] != other[name]]


def close(expected: Path, run: Path) -> None:
    assert read_losses(run) == pytest.approx(read_losses(expected), rel=1e-6, abs=1e-6)
    one, other = (load_file(path / "model" / "model.safetensors") for path in (expected, run))
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, atol=2e-5, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


def test_two_ranks_under_torchrun_train_what_one_process_does(recipe: Path, alone: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "twofold"]
    changes = [f"--set={key}={value}" for key, value in (SHORT | {"run.output": run}).items()]
    path = os.pathsep.join(filter(None, sys.path))
    ended = subprocess.run(
        [*command, "train", str(recipe), *changes],
        capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "2 ranks (shard 2, ZeRO 2)" in ended.stdout
    assert ended.stdout.count(f"step {STEPS}/{STEPS}") == ended.stdout.count(f"finished {STEPS} steps") == 1
    assert ended.stdout.count("'The fox' -> ") == 2, "one rank lets the engine answer"
    close(alone, run)
    theirs = AutoModelForCausalLM.from_pretrained(run / "model").eval()
    ours, ids = weights.load(run / "model"), torch.tensor([5, 9, 120, 33])
    with torch.no_grad():
        logits = ours.logits(ours(ids, PackedContext([4])))
        torch.testing.assert_close(logits, theirs(ids[None]).logits[0], atol=1e-4, rtol=1e-4)


def test_sharded_parameters_train_what_one_process_does(alone: Path, pair: Path) -> None:
    close(alone, pair)


def test_narrow_weights(recipe: Path, tmp_path: Path) -> None:
    """Two ranks keep fp32 shards and multiply bf16; one process goes on from their checkpoint, from its masters."""
    narrow = SHORT | {"model.dtype": "bf16", "run.output": str(tmp_path / "one"), "sample.prompts": []}
    assert launch.run(recipe, narrow) == 0
    run = begin(recipe, 2, tmp_path / "two", model__dtype="bf16")
    run.until(7)
    run.kill(how=signal.SIGTERM)
    assert run.end() == [STOPPED] * 2
    found = sorted((run.output / "checkpoints").glob("step-*"))[-1]
    stored = load_file(found / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    assert launch.run(recipe, narrow | {"run.output": str(run.output)}) == 0
    one, two = read_losses(tmp_path / "one"), read_losses(run.output)
    assert two == pytest.approx(one, abs=2e-2)
    assert max(abs(a - b) for a, b in zip(one, two)) > 0


@pytest.mark.parametrize("what", ["all", "one", "writer"])
def test_killed_and_resumed(recipe: Path, pair: Path, tmp_path: Path, what: str) -> None:
    """Every rank, one rank, or one rank in the middle of a checkpoint's write: the weights are those of no kill."""
    chance = random.SystemRandom()
    rank, step, file = chance.randrange(2), chance.randrange(4, 13), chance.randrange(30)
    print(f"killed {what}: rank {rank}, step {step}, file {file}")
    if what == "writer":
        run = begin(recipe, 2, tmp_path / "run", die=(rank, file % (30 if rank == 0 else 8)))
    else:
        run = begin(recipe, 2, tmp_path / "run")
        run.until(step)
        run.kill(*([rank] if what == "one" else []))
    ended = run.end()
    assert -signal.SIGKILL in ended and 0 not in ended
    if what != "all":
        other = run.said(1 - rank)
        assert "lost another rank" in other and "Traceback" not in other
    finish(recipe, 2, run.output)
    same(pair, run.output)


def test_four_ranks_then_two_then_three_then_one(recipe: Path, alone: Path, tmp_path: Path) -> None:
    run = begin(recipe, 4, tmp_path / "run")
    run.until(5)
    run.saved(3)
    run.kill(3)
    assert 0 not in run.end()
    run = begin(recipe, 2, run.output, parallel__zero=1)
    run.until(8)
    run.kill()
    run.end()
    assert "going on from step-" in run.said()
    run = begin(recipe, 3, run.output)
    run.until(11)
    run.kill(1, how=signal.SIGTERM)
    assert run.end() == [STOPPED] * 3
    assert launch.run(recipe, SHORT | {"run.output": str(run.output), "sample.prompts": []}) == 0
    close(alone, run.output)


def test_what_all_meet_is_told_once(recipe: Path, tmp_path: Path) -> None:
    run = begin(recipe, 2, tmp_path / "run", optimizer__lr="nan")
    assert 0 not in run.end()
    said = [run.said(rank) for rank in range(2)]
    assert "steps in a row were skipped" in said[0] and "rank" not in said[0].splitlines()[-1], said
    assert said[1] == ""


def test_what_one_rank_meets_is_told_with_its_number(recipe: Path, tmp_path: Path) -> None:
    """A checkpoint that cannot be written for something in the way of rank 1's file: told once, and all end."""
    run = tmp_path / "run"
    started = begin(recipe, 2, run, die=(1, -1))
    assert 0 not in started.end()
    said = [started.said(rank) for rank in range(2)]
    assert "rank 1: state-00002-of-00002.safetensors: No space left on device" in said[0]
    assert "checkpoint of step 3 could not be written" in said[0] and said[1] == ""
    assert list((run / "checkpoints").iterdir()) == [], "what is unfinished does not fill the disk"
    finish(recipe, 2, run)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(recipe: Path, pair: Path, tmp_path: Path) -> None:
    run = begin(recipe, 2, tmp_path / "run")
    run.until(8)
    run.kill(how=signal.SIGTERM)
    assert run.end() == [STOPPED] * 2
    steps = sorted((run.output / "checkpoints").glob("step-*"))
    file = steps[-1] / "state-00002-of-00002.safetensors"
    data = bytearray(file.read_bytes())
    data[-7] ^= 16
    file.write_bytes(data)
    run = finish(recipe, 2, run.output)
    assert f"{steps[-1].name} is damaged ({file.name}: SHA-256 does not match)" in run.said()
    assert f"going on from {steps[-2].name}" in run.said() and run.said(1) == ""
    same(pair, run.output)


def test_checkpoints_are_verified_listed_and_exported(pair: Path, tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    shutil.copytree(pair / "checkpoints", run / "checkpoints")
    assert cli.main(["checkpoint", "verify", str(run)]) == 0
    assert "state-00002-of-00002.safetensors" in capsys.readouterr().out
    assert cli.main(["checkpoint", "list", str(run)]) == 0
    *_, last = capsys.readouterr().out.splitlines()
    step, _, unit, ranks, *_, loss = last.split()
    assert (step, unit, ranks) == (str(STEPS), "KiB", "2") and float(loss) == pytest.approx(
        read_losses(pair)[-1], abs=1e-4
    )
    for dtype in ("fp32", "bf16"):
        output = tmp_path / dtype
        assert cli.main(["checkpoint", "export", str(run), "--output", str(output), "--dtype", dtype]) == 0
        found, truth = load_file(output / "model.safetensors"), load_file(pair / "model" / "model.safetensors")
        assert found.keys() == truth.keys() and not (output / "state.index.json").exists()
        assert all(torch.equal(found[name], tensor.to(found[name].dtype)) for name, tensor in truth.items())
        AutoModelForCausalLM.from_pretrained(output)
    damaged = run / LAST / "state-00001-of-00002.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    capsys.readouterr()
    assert cli.main(["checkpoint", "verify", str(run)]) == 2
    told = capsys.readouterr()
    assert f"step-{STEPS:08d}/{damaged.name}: " in told.err and "were written" in told.err
    assert cli.main(["checkpoint", "export", str(run), "--output", str(tmp_path / "before")]) == 0
    assert "step-00000012" in capsys.readouterr().out, "of the newest that is whole"
    assert cli.main(["checkpoint", "export", str(run)]) == 2
    assert cli.main(["checkpoint", "list", str(tmp_path / "bf16")]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("axes", [{"tp": 2, "zero": 1}, {"pp": 2, "zero": 3}], ids=str)
def test_a_mesh_of_several_axes_is_trained_sampled_and_resumed(recipe: Path, alone: Path, tmp_path: Path, axes) -> None:
    changes = {f"parallel__{axis}": size for axis, size in axes.items()}
    run = begin(recipe, 4, tmp_path / "run", **changes, sample__prompts=["The fox"])
    run.until(8)
    run.kill(2)
    assert 0 not in run.end()
    finish(recipe, 2, run.output)
    close(alone, run.output)
