"""A run of align's, and one of TRL's own trainers on the same rows from the same weights, for test_trl_runs.py.

    ours      recipe ─▶ launch.run ─▶ loss and gradient norm of each optimizer step ─▶ the model that it writes
                 │ its order of rows, its rollouts and their rewards
    theirs       ▼     Trainer.train() ─▶ loss and gradient norm of each optimizer step ─▶ its weights

TRL is given rows in the order that our loader deals, a batch a step, and never shuffles them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.e2e.tiny_checkpoint import SPECIAL, make_checkpoint
from twofold.align.experience import Harvest
from twofold.align.grpo import GrpoLesson
from twofold.align.launch import Alignment
from twofold.data.order import Order
from twofold.models import save_adapter
from twofold.train import launch
from twofold.train.step import Step

STEPS, PER_STEP = 4, 6
LR, BETAS, EPS, DECAY, CLIP = 3e-4, [0.9, 0.95], 1e-5, 0.1, 1.0
"""Adam divides a gradient by its own size, so a gradient that is only rounding moves a weight as far as any other does:
with the usual eps of 1e-8 two runs part there by lr, whatever they agree in. 1e-5 is above the rounding here."""
END = "<|end|>"
FIRST = "first"
"""Where in a run's directory the adapters lie as they began."""

RECIPE = f"""
kind = "pretrain"
[optimizer]
lr = {LR}
betas = {BETAS}
eps = {EPS}
clip = {CLIP}
weight_decay = {DECAY}
[schedule]
steps = {STEPS}
kind = "constant"
[run]
save_every = 100
eval_every = 100
[data]
valid_fraction = 0.0
seq_len = 64
pairs_per_step = {PER_STEP}
"""


@dataclass
class Outcome:
    """What a run came to: loss and norm of each optimizer step, and what it trained by the names of its file."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]


class Watched(Alignment):
    """The course of an alignment, and what each of its optimizer steps and harvests was."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.harvests: list[Harvest] = []
        self.loader: Any = None

    def lesson(self, recipe: Any, data: Any, words: Any) -> Any:
        self.loader = data.train
        made = super().lesson(recipe, data, words)
        begin = made.begin

        def begun(trainer: Any, stored: Any) -> None:
            trainer.step = _kept(trainer.step, self.steps)
            if recipe.lora:
                save_adapter(trainer.decoder, recipe.run.output / FIRST)
            begin(trainer, stored)

        made.begin = begun
        if isinstance(made, GrpoLesson):
            made.play.next = _kept(made.play.next, self.harvests)  # type: ignore[method-assign]
        return made


def _kept(call: Any, into: list[Any]) -> Any:
    def kept(*given: Any) -> Any:
        into.append(call(*given))
        return into[-1]

    return kept


class Twin:
    """A folder with a checkpoint, and runs of both sides from it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.base = folder, make_checkpoint(folder / "base")
        weights = load_file(self.base / "model.safetensors")
        weights["lm_head.weight"][SPECIAL.index(END)] *= 4.0  # so that some answers end by themselves
        save_file(weights, self.base / "model.safetensors", metadata={"format": "pt"})
        self.start = weights
        (folder / "recipe.toml").write_text(RECIPE)

    def speaking(self, template: str) -> Path:
        """A folder with the tokenizer and this chat template; gives the template's path."""
        folder = self.folder / "speaking"
        folder.mkdir(exist_ok=True)
        (folder / "tokenizer.json").write_bytes((self.base / "tokenizer.json").read_bytes())
        settings = json.loads((self.base / "tokenizer_config.json").read_text()) | {"chat_template": template}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        path = folder / "template.jinja"
        path.write_text(template)
        return path

    def alike(self, rows: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], int]:
        """The most rows of a kind that are equally long, and how many tokens that is."""
        from transformers import AutoTokenizer

        tokenizer, found = AutoTokenizer.from_pretrained(self.folder / "speaking"), dict[int, list[Mapping[str, Any]]]()
        for row in rows:
            if "messages" in row:
                text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
            else:
                text = row["prompt"] + row["completion"] + END
            found.setdefault(len(tokenizer(text)["input_ids"]), []).append(row)
        length = max(found, key=lambda size: len(found[size]))
        return found[length], length

    def ours(self, name: str, rows: Sequence[Mapping[str, Any]], **changes: Any) -> tuple[Outcome, Watched]:
        """Run a recipe on `rows`; `dpo__beta` is the key dpo.beta."""
        path, output, course = self.folder / f"{name}.jsonl", self.folder / name, Watched()
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        keys = {"model__from": str(self.base), "run__output": str(output), "data__train": [str(path)]} | changes
        assert (
            launch.run(self.folder / "recipe.toml", {k.replace("__", "."): v for k, v in keys.items()}, course=course)
            == 0
        )
        steps = course.steps
        assert not any(it.skipped for it in steps)
        adapters = output / "adapter" / "adapter_model.safetensors"
        weights = load_file(adapters if adapters.exists() else output / "model" / "model.safetensors")
        return Outcome([it.loss for it in steps], [it.grad_norm for it in steps], weights), course

    def theirs(
        self,
        trainer: type,
        config: type,
        rows: Sequence[Mapping[str, Any]],
        *,
        model: Any = None,
        more: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> Outcome:
        """Train with TRL on `rows`, PER_STEP a step, in their order; `more` is what the trainer is given besides."""
        from datasets import Dataset
        from peft import PeftModel, get_peft_model_state_dict
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = model or AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)
        common = {
            "output_dir": str(self.folder / "theirs"),
            "per_device_train_batch_size": PER_STEP,
            "max_steps": STEPS,
            "learning_rate": LR,
            "lr_scheduler_type": "constant",
            "adam_beta1": BETAS[0],
            "adam_beta2": BETAS[1],
            "adam_epsilon": EPS,
            "weight_decay": DECAY,
            "max_grad_norm": CLIP,
            "logging_steps": 1,
            "train_sampling_strategy": "sequential",
            "gradient_checkpointing": False,
            "bf16": False,
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
        }
        made = trainer(
            model=model,
            args=config(**common | settings),
            train_dataset=Dataset.from_list([dict(row) for row in rows]),
            processing_class=AutoTokenizer.from_pretrained(self.base),
            **(more or {}),
        )
        made.train()
        told = [row for row in made.state.log_history if "loss" in row]
        trained = get_peft_model_state_dict(model) if isinstance(model, PeftModel) else model.state_dict()
        weights = {name: value.detach().clone() for name, value in trained.items()}
        return Outcome([row["loss"] for row in told], [float(row["grad_norm"]) for row in told], weights)

    def adapted(self, run: str) -> tuple[Any, dict[str, Tensor]]:
        """transformers' model with the adapters that one of our runs began with, and those adapters."""
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)
        first = self.folder / run / FIRST
        return PeftModel.from_pretrained(base, first, is_trainable=True), load_file(first / "adapter_model.safetensors")

    def same(self, ours: Outcome, theirs: Outcome, start: Mapping[str, Tensor] | None = None) -> None:
        """Losses agree to 1e-5 (of 1 where they are less), norms to 1e-4, and of each tensor the way from the start to
        1e-4 of its length; `start` is what training began with where it was not the checkpoint.
        """
        assert len(ours.losses) == len(theirs.losses) == STEPS
        torch.testing.assert_close(_row(ours.losses), _row(theirs.losses), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(_row(ours.norms), _row(theirs.norms), rtol=1e-4, atol=1e-4)
        assert ours.weights.keys() == theirs.weights.keys()
        start = self.start if start is None else start
        for name, value in theirs.weights.items():
            way = (value - start.get(name, torch.zeros_like(value))).norm()
            assert way > 0, f"{name} was not learned"
            apart = float((ours.weights[name] - value).norm() / way)
            assert apart <= 1e-4, f"{name}: {apart:.1e} of the way apart"


def _row(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


class Replay:
    """Our rollouts and their rewards in the place of TRL's generation and judges."""

    def __init__(self, harvests: Sequence[Harvest]) -> None:
        self._left = list(harvests)
        self._now = self._left[0]

    def rollout(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        """A `rollout_func`: the next step's, whose prompts must be those that are asked."""
        self._now = self._left.pop(0)
        rollouts = self._now.rollouts
        assert [it.prompt.shown for it in rollouts] == prompts
        return {
            "prompt_ids": [list(it.prompt.ids) for it in rollouts],
            "completion_ids": [list(it.ids) for it in rollouts],
            "logprobs": [list(it.logprobs) for it in rollouts],
            "env_mask": [[int(own) for own in it.mine] for it in rollouts],
        }

    def reward(self, completion_ids: list[list[int]], **given: Any) -> list[float]:
        """A reward function: what ours was."""
        assert completion_ids == [list(it.ids) for it in self._now.rollouts]
        return [float(it) for it in self._now.rewards_N]


def dealt(rows: Sequence[Any], steps: int = STEPS, size: int = PER_STEP, seed: int = 0) -> list[Any]:
    """Rows in the order that our loaders deal them."""
    return [rows[place] for place in Order(len(rows), seed=seed).take(0, steps * size)]
