"""GRPO with a reward function of your own: prompts and a Python function in, a few steps, a better model out."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from twofold import LLM, SamplingParams
from twofold.align.run import align
from twofold.commands.model import bundled_model

NAMES = ("add", "area", "double", "first", "is_even", "join", "last", "mean", "square", "total")
ROWS = [{"prompt": f"def {name}(", "wanted": ":"} for name in NAMES]


def soon(completions: Sequence[str], wanted: Sequence[str], **others: Any) -> list[float]:
    """The sooner what the row wants is in an answer, the better. Columns of the rows come as lists."""
    places = [text.find(want) for text, want in zip(completions, wanted)]
    return [0.0 if place < 0 else 1.0 / (1 + place / 8) for place in places]


def recipe(output: Path) -> dict[str, Any]:
    return {
        "algorithm": "grpo",
        "kind": "pretrain",
        "model": {"from": bundled_model()},
        "data": {"seq_len": 48, "max_prompt": 24, "prompts_per_step": 5, "valid_fraction": 0.0},
        "rollout": {"max_tokens": 16, "shown": 2},
        "grpo": {"variant": "dr_grpo", "group": 8},
        "optimizer": {"lr": 3e-4},
        "schedule": {"steps": 4, "warmup": 0},
        "run": {"output": output, "threads": 1},
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = align(recipe(Path(folder)), rows=ROWS, rewards=[soon])
        steps = [row for row in run.rows if "loss" in row]
        for row in steps:
            print(f"step {row['step']}: reward {row['reward']:.3f}, kl {row['kl']}, {row['length']:.0f} tokens")
        answer = LLM(run.model).generate("def greet(", SamplingParams(temperature=0.0, max_tokens=8))[0]
        print(f"def greet({answer.outputs[0].text.splitlines()[0]}")


if __name__ == "__main__":
    main()
