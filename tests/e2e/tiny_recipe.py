"""A recipe that trains a tiny Llama on a few invented sentences in seconds, and a process that runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from twofold.data.bpe import VocabularyConfig, train_tokenizer
from twofold.train.journal import read_rows

CLOCKS = ("time", "tokens_per_second", "peak_share", "memory")

SENTENCES = [
    f"The {animal} {verb} {count} {thing} before the {place} opens."
    for count, (animal, thing) in enumerate(
        (a, t) for a in ("fox", "owl", "hen", "mole", "toad") for t in ("apples", "letters", "stones", "songs")
    )
    for verb in ("counts", "hides", "paints")
    for place in ("market", "harbour")
]


def write_recipe(folder: Path, kind: str = "pretrain", **changes: str) -> Path:
    """Corpus, tokenizer and recipe in `folder`; `changes` add lines to tables by name."""
    if not (folder / "tokenizer").exists():
        (folder / "corpus").mkdir(parents=True)
        for number in range(0, len(SENTENCES), 6):
            (folder / "corpus" / f"{number}.txt").write_text("\n".join(SENTENCES[number : number + 6]))
        chats = [
            {"messages": [{"role": "user", "content": f"Repeat: {s}"}, {"role": "assistant", "content": s}]}
            for s in SENTENCES
        ]
        (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
        train_tokenizer(VocabularyConfig(sources=(str(folder / "corpus"),), size=300), folder / "tokenizer")
    source = folder / "corpus" if kind == "pretrain" else folder / "chats.jsonl"
    path = folder / f"{kind}.toml"
    path.write_text(f"""
kind = "{kind}"
[model]
tokenizer = "{folder / "tokenizer"}"
{changes.get("model", "")}
[model.config]
architectures = ["LlamaForCausalLM"]
model_type = "llama"
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
vocab_size = 304
max_position_embeddings = 256
rms_norm_eps = 1e-5
tie_word_embeddings = true
hidden_act = "silu"
[data]
train = ["{source}"]
valid_fraction = 0.2
seq_len = 64
tokens_per_step = 256
micro_tokens = 128
[optimizer]
lr = 1e-2
[schedule]
steps = 24
warmup = 3
[run]
output = "{folder / "run"}"
eval_every = 8
eval_batches = 2
save_every = 5
{changes.get("run", "")}
[sample]
prompts = ["The fox"]
every = 12
""")
    return path


PROGRAM = """
import os, signal, sys
from twofold.train import checkpoint
from twofold.train.launch import run

left = int(sys.argv[2])  # kill -9 at this flush of a checkpoint's files; -1 never

def flush(path, original=checkpoint._flush):
    global left
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    original(path)

checkpoint._flush = flush
sys.exit(run(sys.argv[1], dict(a.split("=", 1) for a in sys.argv[3:])))
"""


def start(recipe: Path, *changes: str, die_at_flush: int = -1) -> subprocess.Popen[str]:
    """The recipe in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(recipe), str(die_at_flush), *changes],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONUNBUFFERED": "1"},
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Its exit status and all that it said."""
    said, _ = process.communicate(timeout=120)
    return process.returncode, said


def kill_after(recipe: Path, run: Path, step: int, *changes: str, saved: bool = True) -> None:
    """Run it into `run`, and kill it when it says that it did `step`, and (`saved`) its last checkpoint is written."""
    newest = run / "checkpoints" / f"step-{step // 5 * 5:08d}"
    process = start(recipe, f"run.output={run}", *changes)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(f"step {step}/"):
            while saved and step >= 5 and not newest.exists():
                time.sleep(0.002)
            process.kill()
            break
    finish(process)
    assert process.returncode == -signal.SIGKILL, "the run ended before it was killed"


def bits(run: Path) -> dict[str, bytes]:
    """Everything that must be equal, clocks left out."""
    last = run / "checkpoints" / "step-00000024"
    found = {f.name: f.read_bytes() for f in last.iterdir() if f.name != "manifest.json"}
    found |= {f"model/{f.name}": f.read_bytes() for f in (run / "model").iterdir()}
    position = json.loads(found["trainer.json"])
    position["recipe"] = None  # names the run's own directories
    found["trainer.json"] = json.dumps(position).encode()
    rows = [{k: v for k, v in row.items() if k not in CLOCKS} for row in read_rows(run / "log.jsonl")]
    found["log"] = json.dumps(rows).encode()
    return found
