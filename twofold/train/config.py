"""What a training recipe may say: one frozen dataclass a table, every key checked, free of torch.

Recipe
├── model       what is trained: a fresh model from a config table, or a directory to start from; its tokenizer
├── data        what it reads, and how much of it a step and a micro-batch hold
├── optimizer   AdamW and the clip
├── schedule    how many steps, the warm-up, the cosine's floor
├── moe         how a mixture's tokens are dealt to its experts
├── run         where results go, how often to validate and save, threads and seed
└── sample      prompts that the serving engine answers while the model trains
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..core import ConfigError, flatten
from ..data.bpe import VocabularyConfig
from .moe_config import MoeConfig


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A fresh model (`config`, the keys of a Hugging Face config.json) or a directory to start `from`."""

    config: dict[str, Any] | None = None
    """Keys of a config.json, `architectures` among them; the weights are drawn from the run's seed."""
    from_: Path | None = None
    """A checkpoint directory whose weights the run starts from (written `from` in the recipe)."""
    tokenizer: Path | None = None
    """The tokenizer's directory; left out, the one in `from`."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """bf16: forward and backward in bf16, master weights and moments in fp32."""
    recompute: Literal["none", "full"] = "none"
    """full: keep only each layer's input and run its forward again in the backward pass."""

    def __post_init__(self) -> None:
        if (self.config is None) == (self.from_ is None):
            raise ConfigError("[model] takes either `config` (a fresh model) or `from` (a directory): give one of them")
        if self.from_ is None and self.tokenizer is None:
            raise ConfigError("[model] with `config` needs `tokenizer`, a directory with a tokenizer.json")

    @property
    def tokenizer_dir(self) -> Path:
        found = self.tokenizer or self.from_
        assert found is not None  # __post_init__ saw to it
        return found


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What the model reads. A source is a file, a directory, a glob (*.txt, *.jsonl) or a named source."""

    train: tuple[str, ...]
    valid: tuple[str, ...] = ()
    """Held-out sources; left out, `valid_fraction` of the training documents is held out."""
    valid_fraction: float = 0.01
    seq_len: int = 512
    """The longest sequence, in tokens."""
    tokens_per_step: int = 8192
    """Tokens that one optimizer step reads."""
    micro_tokens: int | None = None
    """Tokens of one forward and backward; changes memory, never the loss. Left out: all of the step at once."""

    def __post_init__(self) -> None:
        _positive(self, "seq_len", "tokens_per_step", "micro_tokens")
        if not self.train:
            raise ConfigError("data.train is empty: name at least one file, directory, glob or named source")
        if not 0.0 <= self.valid_fraction < 1.0:
            raise ConfigError(f"data.valid_fraction must be in [0, 1), not {self.valid_fraction}")
        if self.tokens_per_step < self.seq_len:
            raise ConfigError(
                f"data.tokens_per_step is {self.tokens_per_step}, less than one sequence of {self.seq_len}: raise it"
            )
        if self.micro_tokens is not None and self.micro_tokens < self.seq_len:
            raise ConfigError(
                f"data.micro_tokens is {self.micro_tokens}, less than one sequence of {self.seq_len}: raise it"
            )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter 2019); `weight_decay` touches matrices only, never norms and biases."""

    lr: float = 1e-3
    betas: tuple[float, ...] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    """The largest global norm of the gradient."""
    max_skips: int = 10
    """Abort after so many steps in a row whose loss or gradient was not finite."""

    def __post_init__(self) -> None:
        _positive(self, "lr", "eps", "clip", "max_skips")
        if len(self.betas) != 2 or not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ConfigError(f"optimizer.betas must be two numbers in [0, 1), not {list(self.betas)}")
        if self.weight_decay < 0:
            raise ConfigError(f"optimizer.weight_decay must be 0 or more, not {self.weight_decay}")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """A linear warm-up, then half a cosine down to `min_ratio` of the peak at the last step."""

    steps: int
    warmup: int = 0
    min_ratio: float = 0.1

    def __post_init__(self) -> None:
        _positive(self, "steps")
        if not 0 <= self.warmup <= self.steps:
            raise ConfigError(f"schedule.warmup must be from 0 to steps ({self.steps}), not {self.warmup}")
        if not 0.0 <= self.min_ratio <= 1.0:
            raise ConfigError(f"schedule.min_ratio must be in [0, 1], not {self.min_ratio}")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where the run lives and what it does besides stepping. `threads` and `seed` are part of the run's bits."""

    output: Path
    seed: int = 0
    threads: int = 1
    log_every: int = 1
    eval_every: int = 100
    eval_batches: int = 4
    save_every: int = 100
    keep_last: int = 2
    export_dtype: Literal["fp32", "bf16"] = "fp32"
    """How the finished model's weights are written to `output`/model."""

    def __post_init__(self) -> None:
        _positive(self, "threads", "log_every", "eval_every", "eval_batches", "save_every", "keep_last")


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Prompts that the serving engine answers every `every` steps, and at the end; chat recipes ask as the user."""

    prompts: tuple[str, ...] = ()
    every: int = 200
    max_tokens: int = 64
    temperature: float = 0.0

    def __post_init__(self) -> None:
        _positive(self, "every", "max_tokens")
        if not 0.0 <= self.temperature <= 2.0:
            raise ConfigError(f"sample.temperature must be in [0, 2], not {self.temperature}")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run. "pretrain" predicts every token; "chat" only what the assistant says."""

    kind: Literal["pretrain", "chat"]
    model: ModelConfig
    data: DataConfig
    schedule: ScheduleConfig
    run: RunConfig
    tokenizer: VocabularyConfig | None = None
    """A vocabulary to train first, into `model.tokenizer`, when there is none yet."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    moe: MoeConfig = field(default_factory=MoeConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)

    def identity(self) -> dict[str, Any]:
        """The keys that decide the weights' bits, dotted; a run resumes only when all of them are unchanged."""
        free = {f"run.{f.name}" for f in dataclasses.fields(RunConfig)} - {"run.seed", "run.threads"}
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in flatten(self).items()
            if key not in free and not key.startswith("sample.")
        }


def _positive(settings: Any, *names: str) -> None:
    table = type(settings).__name__.removesuffix("Config").lower()
    for name in names:
        value = getattr(settings, name)
        if value is not None and value <= 0:
            raise ConfigError(f"{table}.{name} must be more than 0, not {value}")
