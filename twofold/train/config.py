"""What a training recipe may say: one frozen dataclass a table, every key checked, free of torch.

Recipe
├── model       what is trained: a fresh model from a config table, or a directory to start from; its tokenizer
├── data        what it reads, and how much of it a step and a micro-batch hold
├── optimizer   the rule, its numbers, and the clip
├── schedule    how many steps, the warm-up, the way down
├── parallel    how many processes divide the work (parallel/config.py)
├── elastic     ranks that come and go, hang or diverge (elastic.py)
├── fp16        dynamic loss scaling, where model.dtype is fp16
├── offload     what is kept in the host's memory or on disk
├── moe         how a mixture's tokens are dealt to its experts
├── lora        low-rank adapters in the place of the weights themselves (models/lora_config.py)
├── draft_head  a head that guesses for a model, in the place of the model (draft_config.py)
├── run         where results go, how often to validate and save, threads and seed
└── sample      prompts that the serving engine answers while the model trains
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

from ..core import ConfigError, flatten
from ..data.bpe import VocabularyConfig
from ..models.lora_config import LoraConfig
from ..parallel.config import ParallelConfig
from . import policies
from .draft_config import DraftHeadConfig
from .elastic import ElasticConfig
from .moe_config import MoeConfig
from .offload_config import OffloadConfig
from .policies import Place
from .scaler import LossScaleConfig


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A fresh model (`config`, the keys of a Hugging Face config.json) or a directory to start `from`."""

    config: dict[str, Any] | None = None
    """Keys of a config.json, `architectures` among them; the weights are drawn from the run's seed."""
    from_: Path | None = None
    """A checkpoint directory whose weights the run starts from (written `from` in the recipe)."""
    tokenizer: Path | None = None
    """The tokenizer's directory; left out, the one in `from`."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """bf16, fp16: weights and gradients so, master weights and the optimizer's states in fp32; fp16 scales the loss."""
    sparse_attention: dict[str, Any] | None = None
    """Block-sparse attention: `mode`, `layers` and the mode's keys (`core/sparse.py`); left out, as the model says."""
    recompute: str = "none"
    """What a backward pass computes again: none, selective, attention, ffn, full, or every-K (`policies.py`)."""
    recompute_layers: dict[str, str] = field(default_factory=dict)
    """Layers with a policy of their own: { "0-3" = "full", "5" = "none" }."""
    activations: Place = "device"
    """Where what is kept for the backward pass waits: device, host, or disk (a file in the run's directory)."""

    def __post_init__(self) -> None:
        if (self.config is None) == (self.from_ is None):
            raise ConfigError("[model] takes either `config` (a fresh model) or `from` (a directory): give one of them")
        if self.from_ is None and self.tokenizer is None:
            raise ConfigError("[model] with `config` needs `tokenizer`, a directory with a tokenizer.json")
        policies.check(self.recompute, self.recompute_layers)

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


_ADAM = {"betas": (0.9, 0.95), "eps": 1e-8}
RULES: dict[str, dict[str, Any]] = {
    "adamw": {"weight_decay": 0.1, **_ADAM, "freeze_step": None},
    "adam": {"weight_decay": 0.0, **_ADAM},
    "sgd": {"weight_decay": 0.0, "momentum": 0.0, "nesterov": False},
    "lion": {"weight_decay": 0.1, "betas": (0.9, 0.99)},
    "lamb": {"weight_decay": 0.01, "betas": (0.9, 0.999), "eps": 1e-6, "trust": (0.01, 10.0)},
    "adagrad": {"weight_decay": 0.0, "eps": 1e-10},
    "muon": {
        "weight_decay": 0.1,
        "momentum": 0.95,
        "nesterov": True,
        "adjust": "match_rms_adamw",
        "adamw_lr": None,
        **_ADAM,
    },
}
"""The numbers that each rule takes, and what they are when the recipe says nothing."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """One rule and its numbers; those left out are the rule's own (`RULES`).

    `weight_decay` touches matrices only, never norms and biases. It shrinks the weights themselves; in adam, sgd and
    adagrad it is added to the gradient, as in torch.optim.
    """

    name: Literal["adamw", "adam", "sgd", "lion", "lamb", "adagrad", "muon"] = "adamw"
    lr: float = 1e-3
    betas: tuple[float, ...] | None = None
    eps: float | None = None
    weight_decay: float | None = None
    freeze_step: int | None = None
    """After so many updates adamw's second moment stands still, as one bit a number wants it (Tang et al. 2021)."""
    momentum: float | None = None
    nesterov: bool | None = None
    trust: tuple[float, ...] | None = None
    """The least and the greatest that lamb multiplies a tensor's rate by."""
    adjust: Literal["original", "match_rms_adamw"] | None = None
    """How muon's rate depends on a matrix's shape; match_rms_adamw: a rate made for adamw fits."""
    adamw_lr: float | None = None
    """The rate of what muon leaves to adamw (embeddings, head, norms, biases); left out: `lr`."""
    clip: float = 1.0
    """The largest global norm of the gradient."""
    max_skips: int = 10
    """Abort after so many steps in a row whose loss or gradient was not finite."""

    def __post_init__(self) -> None:
        _positive(self, "lr", "eps", "adamw_lr", "freeze_step", "clip", "max_skips")
        for name in {name: None for takes in RULES.values() for name in takes}:
            users = [rule for rule, takes in RULES.items() if name in takes]
            if self.name not in users and getattr(self, name) is not None:
                raise ConfigError(
                    f"optimizer.{name} means nothing to {self.name}: it is for {', '.join(users)}; "
                    "leave it out or choose another optimizer.name"
                )
        for name in ("betas", "trust"):
            pair = getattr(self, name)
            if pair is not None and len(pair) != 2:
                raise ConfigError(f"optimizer.{name} must be two numbers, not {list(pair)}")
        if self.betas and not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ConfigError(f"optimizer.betas must be two numbers in [0, 1), not {list(self.betas)}")
        if self.trust and not 0.0 <= self.trust[0] <= self.trust[1]:
            raise ConfigError(f"optimizer.trust must be two numbers, 0 or more and rising, not {list(self.trust)}")
        if self.momentum is not None and not 0.0 <= self.momentum < 1.0:
            raise ConfigError(f"optimizer.momentum must be in [0, 1), not {self.momentum}")
        if self.weight_decay is not None and self.weight_decay < 0:
            raise ConfigError(f"optimizer.weight_decay must be 0 or more, not {self.weight_decay}")
        if self.nesterov and self.name == "sgd" and not self.momentum:
            raise ConfigError("optimizer.nesterov needs optimizer.momentum above 0")

    def numbers(self) -> dict[str, Any]:
        """What the rule takes: the recipe's numbers, and the rule's own where it says nothing."""
        given = {name: getattr(self, name) for name in RULES[self.name]}
        return {name: RULES[self.name][name] if value is None else value for name, value in given.items()}


Shape = Literal["linear", "cosine", "sqrt"]
Heads = Literal["language", "reward", "critic", "draft"]


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """A linear warm-up to the peak, then `kind`, down to `min_ratio` of the peak at the last step (see schedule.py)."""

    steps: int
    kind: Literal["cosine", "linear", "constant", "one_cycle", "wsd"] = "cosine"
    warmup: int = 0
    """Steps to the peak; in one_cycle the rising part."""
    min_ratio: float = 0.1
    decay_steps: int | None = None
    """wsd: how many of the last steps go down; left out: a tenth of them."""
    shape: Shape | None = None
    """wsd: how it goes down; one_cycle: up and down (cosine or linear). Left out: cosine."""
    start_ratio: float | None = None
    """one_cycle: where it begins, of the peak; left out: 1/25."""

    def __post_init__(self) -> None:
        _positive(self, "steps", "decay_steps")
        if not 0 <= self.warmup <= self.steps:
            raise ConfigError(f"schedule.warmup must be from 0 to steps ({self.steps}), not {self.warmup}")
        if not 0.0 <= self.min_ratio <= 1.0:
            raise ConfigError(f"schedule.min_ratio must be in [0, 1], not {self.min_ratio}")
        if self.kind == "constant" and self.min_ratio != ScheduleConfig.min_ratio:
            raise ConfigError("schedule.min_ratio means nothing to constant, which never goes down: leave it out")
        takes = {"decay_steps": ("wsd",), "shape": ("wsd", "one_cycle"), "start_ratio": ("one_cycle",)}
        for name, kinds in takes.items():
            if getattr(self, name) is not None and self.kind not in kinds:
                raise ConfigError(f"schedule.{name} means nothing to {self.kind}: it is for {', '.join(kinds)}")
        if self.kind == "one_cycle" and (self.warmup == 0 or self.shape == "sqrt"):
            raise ConfigError("one_cycle rises over schedule.warmup, which must be 1 or more, by cosine or linear")
        if self.start_ratio is not None and not 0.0 <= self.start_ratio <= 1.0:
            raise ConfigError(f"schedule.start_ratio must be in [0, 1], not {self.start_ratio}")
        if self.kind == "wsd" and self.warmup + self.down > self.steps:
            raise ConfigError(
                f"schedule.warmup ({self.warmup}) and decay_steps ({self.down}) are more than steps ({self.steps}): "
                "shorten one"
            )

    @property
    def down(self) -> int:
        """Steps of wsd that go down."""
        return self.decay_steps or max(1, self.steps // 10)


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
    keep_every: int | None = None
    """Checkpoints of every so many steps stay for good, besides the newest `keep_last`."""
    save_behind: bool = True
    """Write checkpoints while the run goes on, from a copy; False spares the copy's memory and waits."""
    export_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """How the finished model's weights are written to `output`/model."""

    def __post_init__(self) -> None:
        _positive(self, "threads", "log_every", "eval_every", "eval_batches", "save_every", "keep_last", "keep_every")


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
    fp16: LossScaleConfig = field(default_factory=LossScaleConfig)
    offload: OffloadConfig = field(default_factory=OffloadConfig)
    moe: MoeConfig = field(default_factory=MoeConfig)
    lora: LoraConfig | None = None
    """Train adapters beside the weights, which stay as they are; left out, all weights are trained."""
    draft_head: DraftHeadConfig | None = None
    """Train a head that guesses for `model.from`, which stays as it is; left out, the model is trained."""
    sample: SampleConfig = field(default_factory=SampleConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    elastic: ElasticConfig = field(default_factory=ElasticConfig)

    def __post_init__(self) -> None:
        if self.fp16 != LossScaleConfig() and self.model.dtype != "fp16":
            raise ConfigError(f"[fp16] is about scaling the loss, and model.dtype is {self.model.dtype}: leave it out")
        if self.lora is not None and self.moe.bias_rate:
            raise ConfigError(
                "moe.bias_rate moves the choice of experts, and [lora] leaves the model as it is: set it to 0"
            )
        if self.elastic.max is not None and self.parallel.dp != "auto":
            raise ConfigError('elastic.max lets ranks come and go: parallel.dp must be "auto", what the others leave')
        if self.draft_head is not None:
            self._check_draft_head()

    def _check_draft_head(self) -> None:
        if self.model.from_ is None:
            raise ConfigError("[draft_head] needs model.from, the directory of the model that it guesses for")
        if self.lora is not None or self.sample.prompts:
            other = "[lora] adapts" if self.lora is not None else "sample.prompts are for"
            raise ConfigError(f"[draft_head] trains a head beside a model, and {other} the model itself: leave one out")
        for axis in ("tp", "pp", "sp", "ep"):
            if getattr(self.parallel, axis) > 1:
                raise ConfigError(f"[draft_head] is one layer, divided by ZeRO alone: set parallel.{axis} = 1")

    @property
    def heads(self) -> Heads:
        """What stands on the layers: a language head; a score in its place (reward), or beside it (critic).

        A draft head is layers alone, and uses another model's.
        """
        return "language" if self.draft_head is None else "draft"

    def identity(self) -> dict[str, Any]:
        """The keys that decide the weights' bits, dotted; a run resumes only when all of them are unchanged."""
        numbers = {f"optimizer.{name}": value for name, value in self.optimizer.numbers().items()}
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in (flatten(self) | numbers).items()
            if _decides(key)
        }

    def changes(self, before: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """What is not as in the identity of an older run: (before, now) by key.

        A key that its trainer did not know yet was at its default.
        """
        now = self.identity()
        before = {key: value for key, value in _defaults(type(self)).items() if key in now} | dict(before)
        keys = sorted(now.keys() | before.keys())
        return {key: (before.get(key), now.get(key)) for key in keys if before.get(key) != now.get(key)}


def _decides(key: str) -> bool:
    table, _, name = key.partition(".")
    if table == "model":  # gradients are the same bits whatever is kept
        return name not in ("recompute", "recompute_layers", "activations")
    return table not in ("sample", "offload", "parallel", "elastic") and (table != "run" or name in ("seed", "threads"))


def _defaults(cls: type, prefix: str = "") -> dict[str, Any]:
    """The default of every dotted key that decides and has one."""
    hints, out = get_type_hints(cls), dict[str, Any]()
    for it in dataclasses.fields(cls):
        key = prefix + it.name.rstrip("_")
        if dataclasses.is_dataclass(hints[it.name]):
            out |= _defaults(hints[it.name], f"{key}.")
        elif it.default is not dataclasses.MISSING and _decides(key):
            out[key] = list(it.default) if isinstance(it.default, tuple) else it.default
    return out


def _positive(settings: Any, *names: str) -> None:
    table = type(settings).__name__.removesuffix("Config").lower()
    for name in names:
        value = getattr(settings, name)
        if value is not None and value <= 0:
            raise ConfigError(f"{table}.{name} must be more than 0, not {value}")
