"""What every rank of the training benchmark does, whoever trains: the same sequences and rule, turns in lines of JSON.

    -> {"steps": n}                                                               one turn
    <- {"seconds": s, "first": k, "losses": [nats a target], "peak_mib": m}       this rank's own; steps k to k + n - 1

The first line of all is {"ready": "name version, settings"}. Ranks find each other as torchrun would have them (RANK,
WORLD_SIZE, MASTER_ADDR, MASTER_PORT). Nothing here imports an engine before it is asked to.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from protocol import Channel

SEED = 20_000
SKEW = 4
"""Token ids are a uniform number to this power: some come often, so that there is something to learn in a few steps."""
RULE: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8}
DECAY, CLIP = 0.1, 1.0
"""AdamW as our recipes have it when they say nothing; decay of matrices only."""


def arguments(about: str | None) -> argparse.ArgumentParser:
    """What every runner takes."""
    parser = argparse.ArgumentParser(description=(about or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", required=True, help="a checkpoint's directory as Hugging Face lays it out")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--length", type=int, required=True, help="tokens of a sequence")
    parser.add_argument("--micro", type=int, required=True, help="sequences of a rank and step")
    return parser


def place() -> tuple[int, int]:
    """This rank and how many there are."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def sequences(args: argparse.Namespace, step: int) -> Any:
    """Token ids of a step, of all ranks: int64 [ranks * micro, length]; a rank's are the `micro` rows in its turn."""
    import torch

    vocab = json.loads((Path(args.model) / "config.json").read_text())["vocab_size"]
    generator = torch.Generator().manual_seed(SEED + step)
    drawn = torch.rand(place()[1] * args.micro, args.length, generator=generator, dtype=torch.float64)
    return (drawn**SKEW * vocab).long()


def mine(args: argparse.Namespace, step: int) -> Any:
    """This rank's rows of `sequences`."""
    rank = place()[0]
    return sequences(args, step)[rank * args.micro : (rank + 1) * args.micro]


def causal_model(args: argparse.Namespace) -> Any:
    """transformers' model of the checkpoint, fp32, with torch's fused attention."""
    import torch
    import transformers

    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(args.model, dtype=torch.float32, attn_implementation="sdpa").train()
    model.config.use_cache = False
    return model


def optimizer(model: Any) -> Any:
    """torch's fused AdamW, its fastest on a CPU."""
    import torch

    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, fused=True, **RULE)


def versions(*names: str) -> str:
    """What is installed of some distributions, as one line."""
    from importlib.metadata import version

    return ", ".join(f"{name} {version(name)}" for name in names)


class Turns:
    """How many steps are wanted, and what came of them: `wanted`, one step, `done`, until nobody asks any more."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self.step = 0
        self._left = 0
        self._first, self._began = 0, 0.0
        self._losses: list[float] = []

    def ready(self, name: str) -> None:
        """The model is loaded: from here its memory counts."""
        forget_peak()
        self._channel.tell({"ready": name})

    def wanted(self) -> bool:
        """Whether another step is; waits for the next turn when this one is over."""
        if not self._left:
            line = sys.stdin.readline()
            if not line:
                return False
            self._left = int(json.loads(line)["steps"])
            self._first, self._losses, self._began = self.step, [], time.perf_counter()
        return True

    def done(self, loss: float) -> None:
        """One step was made."""
        self._losses.append(loss)
        self.step, self._left = self.step + 1, self._left - 1
        if not self._left:
            seconds = time.perf_counter() - self._began
            answer = {"seconds": seconds, "first": self._first, "losses": self._losses, "peak_mib": peak_mib()}
            self._channel.tell(answer)


def forget_peak() -> None:
    """Let the kernel count this process's most memory anew, from what it holds now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> float:
    """The most resident memory since `forget_peak`: VmHWM, libraries and mapped files included."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024
