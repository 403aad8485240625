"""A recipe of each alignment algorithm for the tiny checkpoint, runs of them here and in a process that dies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tiny_checkpoint import make_checkpoint

from twofold.align.launch import Alignment
from twofold.train import launch
from twofold.train.journal import read_rows

STEPS = 6
CLOCKS = ("time", "seconds", "per_second", "peak_share", "memory")

SHARED = """
algorithm = "{algorithm}"
kind = "pretrain"
[model]
from = "{folder}/base"
[optimizer]
lr = 3e-3
weight_decay = 0.0
[schedule]
steps = 6
kind = "constant"
[run]
output = "{folder}/{name}"
eval_every = 3
save_every = 2
keep_last = 9
[data]
valid_fraction = 0.25
seq_len = 64
micro_tokens = 128
"""
PLAYED = """
train = ["{folder}/prompts.jsonl"]
max_prompt = 32
prompts_per_step = 4
[rollout]
max_tokens = 12
num_blocks = 24
max_num_batched_tokens = 64
max_num_seqs = 6
[[rewards]]
kind = "length"
unit = "characters"
most = 10
slack = 40
"""
LEAD = "# The quick brown fox jumps over the lazy dog.\n"
"""What every prompt begins with: more than a block of the cache."""
RECIPES = {
    "sft": 'train = ["{folder}/sft.jsonl"]\ntokens_per_step = 256',
    "reward": 'train = ["{folder}/pairs.jsonl"]\npairs_per_step = 6\n[reward]\ncentring = 0.01',
    "dpo": 'train = ["{folder}/pairs.jsonl"]\npairs_per_step = 6',
    "kto": 'train = ["{folder}/pairs.jsonl"]\npairs_per_step = 6\n[dpo]\nloss = "kto"',
    "grpo": PLAYED + "[grpo]\ngroup = 4\nbeta = 0.05\nepochs = 2\nminibatches = 2",
    "dapo": PLAYED + '[grpo]\nvariant = "dapo"\ngroup = 4\nmask_truncated = false',
    "ppo": 'text = ["{folder}/sft.jsonl"]\ntokens_per_step = 128'
    + PLAYED
    + "[ppo]\nepochs = 2\nminibatches = 2\nema_decay = 0.9\nkl_target = 1.0\npretrain_coef = 0.1\nentropy_coef = 0.01",
}


def write_recipes(folder: Path) -> Path:
    """The base model, its data, and a recipe for each of RECIPES."""
    make_checkpoint(folder / "base")
    names = [
        f"{verb}_{thing}" for verb in ("add", "print", "fox", "sleep") for thing in ("dog", "range", "cafe", "a", "b")
    ]
    rows = [
        {"prompt": f"def {name}(a):\n", "chosen": "    return a\n", "rejected": f"    fox {n}\n"}
        for n, name in enumerate(names)
    ]
    _lines(folder / "pairs.jsonl", rows)
    _lines(folder / "sft.jsonl", [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows])
    _lines(folder / "prompts.jsonl", [{"prompt": LEAD + row["prompt"]} for row in rows])
    for name, more in RECIPES.items():
        algorithm = {"kto": "dpo", "dapo": "grpo"}.get(name, name)
        text = (SHARED + more).format(folder=folder, name=name, algorithm=algorithm)
        (folder / f"{name}.toml").write_text(text)
    return folder


def run_here(recipe: Path, **changes: Any) -> int:
    """Run a recipe in this process; `optimizer__lr` is the key optimizer.lr."""
    overrides = {key.replace("__", "."): value for key, value in changes.items()}
    return launch.run(recipe, overrides, course=Alignment())


def run_and_die(recipe: Path, output: Path, step: int, **changes: Any) -> None:
    """Run a recipe in a process that kills itself, kill -9, when it has done `step` steps."""
    overrides = {"run.output": str(output)} | {key.replace("__", "."): value for key, value in changes.items()}
    code = f"""
import os, signal
from twofold.align.launch import Alignment
from twofold.train import launch, trainer
report = trainer.Trainer._report
def dies(self, *given):
    report(self, *given)
    if self.position.step == {step}:
        self.saver.wait()
        os.kill(os.getpid(), signal.SIGKILL)
trainer.Trainer._report = dies
launch.run({str(recipe)!r}, {overrides!r}, course=Alignment())
"""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == -9, done.stdout + done.stderr


def rows_of(run: Path) -> list[dict[str, Any]]:
    """A run's record without what clocks say, and without who held what, which every process tells once."""
    return [
        {key: value for key, value in row.items() if not any(word in key for word in CLOCKS)}
        for row in read_rows(run / "log.jsonl")
        if "ledger" not in row
    ]


def outcome(run: Path) -> dict[str, bytes]:
    """Everything that a run that was disturbed must have alike, clocks left out."""
    last = max((run / "checkpoints").glob("step-*"))
    found = {f"{last.name}/{it.name}": it.read_bytes() for it in last.iterdir() if it.name != "manifest.json"}
    found |= {f"{it.parent.name}/{it.name}": it.read_bytes() for it in run.glob("model*/*")}
    position = json.loads(found[f"{last.name}/trainer.json"]) | {"recipe": None}  # names the run's own directories
    found[f"{last.name}/trainer.json"] = json.dumps(position).encode()
    return found | {"rows": json.dumps(rows_of(run)).encode()}


def _lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
