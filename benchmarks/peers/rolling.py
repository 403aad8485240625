"""What every runner of the rollout benchmark does, whoever learns: the same prompts, reward and rule, turns in JSON.

    -> {"steps": n, "given": null | [[prompt ids, [answer ids, ...]], ...]}
    <- {"seconds": [s], "rollout": [s], "processor": [s], "rollout_processor": [s], "tokens": [n],
        "told": [{"loss": ..}], "rollouts": [[..]], "peak_mib": m}

A list has one entry for each step of the turn: the whole step's seconds, those of its rollout, both again by the
processor's clock, tokens of the answers, figures. `rollouts` are those of the turn's last step, `given` answers to be
learned from in place of one's own: two engines that were given the same ones must come to the same figures. The first
line of all is {"ready": "name version"}.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from protocol import Channel
from training import forget_peak, peak_mib

RULE: dict[str, Any] = {"lr": 1e-5, "betas": (0.9, 0.95), "eps": 1e-8}
CLIP = 1.0
"""AdamW without decay, and the largest norm of a gradient."""
VALUE_COEF, KL_COEF, LAM = 0.1, 0.05, 0.95
"""Of PPO."""
ALL_STEPS = 1_000_000

Given = list[tuple[list[int], list[list[int]]]]
"""Prompts and the answers to each, as ids."""


def arguments(about: str | None) -> argparse.ArgumentParser:
    """What every runner takes."""
    parser = argparse.ArgumentParser(description=(about or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", type=Path, required=True, help="a checkpoint's directory, and prompts in it")
    parser.add_argument("--prompts", required=True, help="the file of prompts in that directory")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--group", type=int, required=True, help="answers to each prompt")
    parser.add_argument("--length", type=int, required=True, help="tokens of a prompt")
    parser.add_argument("--new", type=int, required=True, help="the longest answer, in tokens")
    parser.add_argument("--ends", action="store_true", help="answers may end before that")
    parser.add_argument("--output", type=Path, required=True, help="where the run may write")
    return parser


def texts(args: argparse.Namespace) -> list[str]:
    """The prompts of a step."""
    return [json.loads(line)["prompt"] for line in (args.model / args.prompts).read_text().splitlines()]


def even(completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
    """The reward: the share of an answer's ids that are even. Costs nothing, and hangs on what was drawn."""
    return [sum(token % 2 == 0 for token in ids) / max(1, len(ids)) for ids in completion_ids]


class Stopwatch:
    """Seconds since it was made, by the wall's clock and by this process's."""

    def __init__(self) -> None:
        self._began = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        return time.perf_counter() - self._began[0], time.process_time() - self._began[1]


class Steps:
    """How many steps are wanted and what came of them: `wanted`, then `rolled` and `done`, until nobody asks."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._left = 0
        self._watch = Stopwatch()
        self._answer: dict[str, Any] = {}
        self.given: dict[tuple[int, ...], list[list[int]]] = {}

    def ready(self, name: str) -> None:
        """The model is loaded: from here its memory counts."""
        forget_peak()
        self._channel.tell({"ready": name})

    def wanted(self) -> bool:
        """Whether another step is, whose clock begins now; waits for the next turn when this one is over."""
        if not self._left:
            line = sys.stdin.readline()
            if not line:
                return False
            asked = json.loads(line)
            self._left = int(asked["steps"])
            self.given = {tuple(prompt): list(answers) for prompt, answers in asked.get("given") or []}
            lists = ("seconds", "processor", "rollout", "rollout_processor", "tokens", "told")
            self._answer = {name: [] for name in lists}
        self._watch = Stopwatch()
        return True

    def answers(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """The given answers in the order of these prompts; each is given once."""
        left = {prompt: iter(answers) for prompt, answers in self.given.items()}
        return [list(next(left[tuple(prompt)])) for prompt in prompts]

    def rolled(
        self, seconds: float, processor: float, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
    ) -> None:
        """What a step's rollout came to: its seconds by both clocks, the answers in the order of their prompts."""
        by_prompt: dict[tuple[int, ...], list[list[int]]] = defaultdict(list)
        for prompt, answer in zip(prompts, answers, strict=True):
            by_prompt[tuple(prompt)].append(list(answer))
        self._answer["rollout"].append(seconds)
        self._answer["rollout_processor"].append(processor)
        self._answer["tokens"].append(sum(map(len, answers)))
        self._answer["rollouts"] = [[list(prompt), found] for prompt, found in by_prompt.items()]

    def done(self, **told: float) -> None:
        """One step was made."""
        seconds, processor = self._watch.read()
        self._answer["seconds"].append(seconds)
        self._answer["processor"].append(processor)
        self._answer["told"].append(told)
        self._left -= 1
        if not self._left:
            self._channel.tell(self._answer | {"peak_mib": peak_mib()})


def use_threads(args: argparse.Namespace) -> None:
    """As many threads as were asked for, whoever makes them. Before torch is imported."""
    os.environ["OMP_NUM_THREADS"] = str(args.threads)


def causal_model(folder: Path, kind: str = "AutoModelForCausalLM", **more: Any) -> Any:
    """transformers' model of the checkpoint, fp32, with torch's fused attention."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    load = getattr(transformers, kind).from_pretrained
    return load(folder, dtype=torch.float32, attn_implementation="sdpa", **more)


def rule_of(*models: Any) -> tuple[Any, Any]:
    """torch's fused AdamW over these models' weights, its fastest on a CPU, and a schedule that changes nothing."""
    import torch

    weights = {id(p): p for model in models for p in model.parameters()}
    rule = torch.optim.AdamW(list(weights.values()), fused=True, weight_decay=0.0, **RULE)
    return rule, torch.optim.lr_scheduler.LambdaLR(rule, lambda step: 1.0)


def trained_by(args: argparse.Namespace, rows: int, answers: int) -> dict[str, Any]:
    """What TRL's configs have in common: `rows` answers to a pass, all `answers` of a step to an optimizer step."""
    return {
        "output_dir": str(args.output),
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": answers // rows,
        "max_grad_norm": CLIP,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
