"""Does a run survive anything? Killed at random moments, some inside a checkpoint's write, it must end with the bits of
one that nobody touched.

    python benchmarks/kills.py --kills 50 --ranks 2        five to ten minutes

An undisturbed run, then the same recipe in another directory: started, killed (all ranks, or one of them, and then the
others have to end by themselves) at a random step and a random moment after it, or while it starts, started again, ...
and at last left alone. Every start must go on by itself; the weights, the optimizer's state and the record of losses
must be equal.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TABLES = """
kind = "pretrain"
[tokenizer]
sources = ["{folder}/text"]
size = 300
[model]
tokenizer = "{folder}/tokenizer"
[model.config]
architectures = ["LlamaForCausalLM"]
model_type = "llama"
hidden_size = 64
intermediate_size = 128
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
vocab_size = 304
max_position_embeddings = 128
rms_norm_eps = 1e-5
tie_word_embeddings = true
hidden_act = "silu"
[data]
train = ["{folder}/text"]
seq_len = 64
tokens_per_step = 256
[optimizer]
lr = 1e-3
[schedule]
steps = {steps}
[run]
output = "{folder}/untouched"
save_every = 3
eval_every = 20
[parallel]
zero = 3
timeout = 30.0
"""
PATIENCE = 300.0
STARTING = 0.1
"""The share of kills that fall while the run starts."""


class Ranks:
    """One start of the run."""

    def __init__(self, recipe: Path, world: int, output: Path) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            port = taken.getsockname()[1]
        self.record = output / "log.jsonl"
        self._before = self._file()
        self.processes = []
        for rank in range(world):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
            told = {name: str(value) for name, value in {**place, "MASTER_PORT": port}.items()}
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "twofold", "train", str(recipe), "--set", f"run.output={output}"],
                    env=os.environ | told | {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"},
                    stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    text=True,
                )
            )

    def _file(self) -> int:
        return self.record.stat().st_ino if self.record.exists() else 0

    def step(self) -> int:
        """The last step in the record; none before this start has cut off what came behind its checkpoint."""
        if self._file() == self._before:
            return 0
        try:
            return int(json.loads(self.record.read_text().splitlines()[-1])["step"])
        except (OSError, ValueError, IndexError):
            return 0

    def until(self, step: int) -> bool:
        """Wait for a step; False when the run ended before it."""
        ends = time.monotonic() + PATIENCE
        while self.step() < step:
            if any(process.poll() is not None for process in self.processes):
                return False
            if time.monotonic() > ends:
                raise SystemExit(f"step {step} was not reached in {PATIENCE:.0f} s")
            time.sleep(0.002)
        return True

    def end(self) -> tuple[list[int], str]:
        """Every rank's status, and what the main one said."""
        said = self.processes[0].communicate(timeout=PATIENCE)[0]
        return [process.wait(PATIENCE) for process in self.processes], said


def main() -> int:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--kills", type=int, default=50)
    flags.add_argument("--ranks", type=int, default=2)
    flags.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    given = flags.parse_args()
    chance = random.Random(given.seed)
    print(f"{given.kills} kills of {given.ranks} ranks, seed {given.seed}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder, steps = Path(name), 8 * given.kills
        (folder / "text").mkdir()
        for number in range(40):
            words = " ".join(chance.choice(("a", "red", "fox", "owl", "sings", "hides")) for _ in range(200))
            (folder / "text" / f"{number}.txt").write_text(words)
        recipe = folder / "recipe.toml"
        recipe.write_text(TABLES.format(folder=folder, steps=steps))
        statuses, said = Ranks(recipe, given.ranks, folder / "untouched").end()
        if any(statuses):
            raise SystemExit(f"the undisturbed run ended with {statuses}:\n{said}")
        killed, writing = disturb(recipe, folder / "killed", given.kills, given.ranks, steps, chance)
        one, other = (bits(folder / run, steps) for run in ("untouched", "killed"))
        differ = [key for key in one.keys() | other.keys() if one.get(key) != other.get(key)]
    print(f"{killed} kills, {writing} of them inside a checkpoint's write, {steps} steps: ", end="")
    print(f"differs in {', '.join(sorted(differ))}" if differ else "every bit of the run that nobody touched")
    return 1 if differ or killed < given.kills else 0


def disturb(recipe: Path, output: Path, kills: int, world: int, steps: int, chance: random.Random) -> tuple[int, int]:
    """Kill a run `kills` times and let it end: how many times it was, and how many while a checkpoint was written."""
    writing, at = 0, 0
    for number in range(kills):
        run = Ranks(recipe, world, output)
        target = min(at + chance.randrange(1, 14), steps - 1)
        if chance.random() < STARTING:
            time.sleep(chance.random() * 6)
        elif run.until(target):
            time.sleep(chance.random() * 0.03)
        else:
            raise SystemExit(f"kill {number + 1}: the run ended with {run.end()} before step {target}")
        doomed = chance.choice([run.processes, [chance.choice(run.processes)]])
        for process in doomed:
            process.send_signal(signal.SIGKILL)
        statuses, _ = run.end()
        if 0 in statuses:
            raise SystemExit(f"kill {number + 1}: a rank says that it finished: {statuses}")
        torn = any(entry.name.startswith(".") for entry in (output / "checkpoints").glob(".*"))
        kept = sorted((output / "checkpoints").glob("step-*"))
        writing, at = writing + torn, int(kept[-1].name[5:]) if kept else 0
        who = "all ranks" if len(doomed) == world else f"rank {run.processes.index(doomed[0])}"
        print(
            f"  {number + 1:>3}  {who:<9}  step {run.step():>4}  whole: {at:>4}{'  mid-write' if torn else ''}",
            flush=True,
        )
    statuses, said = Ranks(recipe, world, output).end()
    if any(statuses):
        raise SystemExit(f"left alone, it ended with {statuses}:\n{said}")
    return kills, writing


def bits(run: Path, steps: int) -> dict[str, str]:
    """A digest of all that must be equal."""
    last = run / "checkpoints" / f"step-{steps:08d}"
    files = [file for folder in (last, run / "model") for file in folder.iterdir()]
    digests = {
        f"{file.parent.name}/{file.name}": hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
        if file.name not in ("manifest.json", "trainer.json")  # which name the run's own directory
    }
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    told = [(row["step"], row.get("loss"), row.get("valid_loss"), row.get("grad_norm")) for row in rows]
    return digests | {"the record": hashlib.sha256(repr(told).encode()).hexdigest()}


if __name__ == "__main__":
    sys.exit(main())
