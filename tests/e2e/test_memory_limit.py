"""A run whose state exceeds what its process may take trains from disk, with the bits of a run without a limit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_recipe import finish, write_recipe

from twofold.train.journal import read_rows

MIB = 1 << 20
WEIGHTS = 12.74e6  # so 194 MiB of weights, gradients and states
LIMIT = 96 * MIB
BIG = {
    "model.config.hidden_size": 512,
    "model.config.intermediate_size": 1536,
    "model.config.num_hidden_layers": 4,
    "model.recompute": "full",
    "data.tokens_per_step": 128,
    "data.micro_tokens": 64,
    "optimizer.lr": 1e-3,
    "schedule.steps": 4,
    "run.eval_every": 4,
    "run.save_every": 2,
    "sample.prompts": "[]",
}
DISK = {"offload.optimizer": "disk", "offload.gradients": "disk", "offload.parameters": "disk", "offload.tile": 4 * MIB}
PROGRAM = """
import resource, sys
import torch
import torch._dynamo  # which torch's checkpoint imports at its first call, 60 MiB of it
from twofold import cli
from twofold.commands import train
torch.mm(torch.ones(64, 64), torch.ones(64, 64))
limit = int(sys.argv[1])
if limit:
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    limit += int(status["VmData"].split()[0]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
sys.exit(cli.main(["train", *sys.argv[2:]]))
"""


def start(recipe: Path, run: Path, limit: int = 0, **changes) -> subprocess.Popen[str]:
    """The door's `train` in a process that may take `limit` bytes more than its libraries did."""
    settings = BIG | changes | {"run.output": run}
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(limit), str(recipe), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONUNBUFFERED": "1"},
    )


def numbers(run: Path) -> list[tuple[int, float, float]]:
    return [(row["step"], row["loss"], row["grad_norm"]) for row in read_rows(run / "log.jsonl") if "loss" in row]


@pytest.fixture(scope="module")
def free(tmp_path_factory) -> tuple[Path, Path]:
    """A recipe, and its run with all the memory it likes."""
    folder = tmp_path_factory.mktemp("offload")
    recipe = write_recipe(folder)
    status, said = finish(start(recipe, folder / "free"))
    assert status == 0, said
    return recipe, folder / "free"


def test_the_limit_is_too_small_for_the_state_and_that_is_told_in_one_line(free, tmp_path: Path) -> None:
    status, said = finish(start(free[0], tmp_path / "run", LIMIT))
    assert status == 2, said
    (line,) = [line for line in said.splitlines() if "memory" in line]
    assert "out of memory: " in line and "MiB more could not be had" in line
    assert 'offload.optimizer = "disk", offload.gradients = "disk", offload.parameters = "disk"' in line
    assert "Traceback" not in said and not numbers(tmp_path / "run")


def test_from_disk_it_trains_under_the_limit_also_when_it_is_killed_between(free, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(free[0], run, LIMIT, **DISK)
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if line.startswith("step 3/"):
            process.kill()
            break
    finish(process)
    assert process.returncode == -9, said
    status, said = finish(start(free[0], run, LIMIT, **DISK))
    assert status == 0 and "going on from step-00000002" in said, said
    assert numbers(run) == numbers(free[1]) and len(numbers(run)) == 4
    for name in ("model/model.safetensors", "checkpoints/step-00000004/state-00001-of-00001.safetensors"):
        assert (run / name).read_bytes() == (free[1] / name).read_bytes(), name
    assert (run / "model" / "model.safetensors").stat().st_size == pytest.approx(4 * WEIGHTS, rel=0.02)
    assert not [path for path in run.iterdir() if path.name.startswith(".pool")]
