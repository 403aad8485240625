"""What an alignment recipe may say: all that a training recipe does, and how it is judged; free of torch.

AlignRecipe
├── algorithm     sft, reward, dpo, ppo, grpo
├── data          what is read: texts, pairs, labelled answers or prompts, and how many of them a step takes
├── rollout       how the policy is sampled                         ppo, grpo (rollout_config.py)
├── rewards       what judges its answers, a table each             ppo, grpo (rewards/config.py)
├── correction    what is done about tokens of another policy       ppo, grpo (policy_config.py)
├── reward, dpo, ppo, grpo     a table each                      (preference_config.py, policy_config.py)
└── model, optimizer, schedule, parallel, lora, offload, run ...    as in train/config.py
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from ..core import ConfigError
from ..train.config import DataConfig, Heads, Recipe
from .policy_config import CorrectionConfig, GrpoConfig, PpoConfig
from .preference_config import DpoConfig, RewardModelConfig
from .rewards.config import RewardConfig
from .rollout_config import RolloutConfig

Algorithm = Literal["sft", "reward", "dpo", "ppo", "grpo"]
TABLES = {
    "reward": ("reward",),
    "dpo": ("dpo",),
    "ppo": ("ppo", "rollout", "rewards", "correction"),
    "grpo": ("grpo", "rollout", "rewards", "correction"),
}
"""Which tables an algorithm reads, of those that not all do."""
SPEED = {
    "rollout": ("max_num_seqs", "max_num_batched_tokens", "block_size", "num_blocks", "exact", "shown"),
    "data": ("eval_prompts",),
    "rewards": ("timeout", "start", "retries"),
}
"""Keys that change how fast a run is, what is shown or how long one waits, and no token of it."""


@dataclass(frozen=True, kw_only=True)
class AlignData(DataConfig):
    """What is read, as `data/` has it: rows of text, of preferences, of labelled answers, or prompts."""

    pairs_per_step: int = 16
    """reward, dpo: pairs (or labelled answers, kto) that one optimizer step learns from."""
    prompts_per_step: int = 16
    """ppo, grpo: prompts that are answered in a step."""
    max_prompt: int | None = None
    """The longest prompt, in tokens; left out, what rollout.max_tokens or seq_len leaves of it."""
    too_long: Literal["cut", "drop"] = "cut"
    """cut: a prompt loses its beginning, a completion its end; drop: the row is left out."""
    eval_prompts: int = 64
    """ppo, grpo: held-out prompts that are answered every run.eval_every steps, at most."""
    text: tuple[str, ...] = ()
    """ppo: the text that ppo.pretrain_coef mixes in."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("pairs_per_step", "prompts_per_step", "max_prompt", "eval_prompts"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"data.{name} must be 1 or more, not {value}")


@dataclass(frozen=True, kw_only=True)
class AlignRecipe(Recipe):
    """One alignment run."""

    algorithm: Algorithm
    data: AlignData
    kind: Literal["pretrain", "chat"] = "chat"
    """chat: a prompt that is text is what the user says; pretrain: it is text to go on with."""
    reward: RewardModelConfig = field(default_factory=RewardModelConfig)
    dpo: DpoConfig = field(default_factory=DpoConfig)
    ppo: PpoConfig = field(default_factory=PpoConfig)
    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    rewards: tuple[RewardConfig, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_tables()
        if self.model.from_ is None:
            raise ConfigError("[model] of an alignment recipe needs `from`, the directory of the model that is aligned")
        if self.algorithm != "sft":
            self._check_axes()
        if self.plays:
            self._check_play()
        if self.ppo.pretrain_coef and not self.data.text:
            raise ConfigError("ppo.pretrain_coef mixes in text, and data.text names none: name a source")
        if self.data.text and not self.ppo.pretrain_coef:
            raise ConfigError(
                "data.text is mixed in by ppo.pretrain_coef, which is 0: give it a value, or leave both out"
            )
        if self.algorithm == "reward" and self.sample.prompts:
            raise ConfigError("[sample] lets the model answer prompts, and a reward model cannot: leave it out")

    @property
    def plays(self) -> bool:
        """Whether the policy answers prompts while it learns."""
        return self.algorithm in ("ppo", "grpo")

    @property
    def heads(self) -> Heads:
        """A reward model has a score in the place of its language head, PPO's policy a value beside it."""
        return {"reward": "reward", "ppo": "critic"}.get(self.algorithm, "language")  # type: ignore[return-value]

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt that is answered."""
        return self.data.max_prompt or max(1, self.data.seq_len - self.rollout.max_tokens)

    def identity(self) -> dict[str, Any]:
        read = TABLES.get(self.algorithm, ())
        others = {name for names in TABLES.values() for name in names if name not in read}

        def decides(key: str) -> bool:
            table, _, name = key.partition(".")
            speed = name.rpartition(".")[2] in SPEED.get(table, ()) or name.startswith("remote.")
            return table not in others and not speed

        return {key: value for key, value in super().identity().items() if decides(key)}

    def _check_tables(self) -> None:
        read = TABLES.get(self.algorithm, ())
        plain: dict[str, Any] = {
            "reward": RewardModelConfig(),
            "dpo": DpoConfig(),
            "ppo": PpoConfig(),
            "grpo": GrpoConfig(),
            "rollout": RolloutConfig(),
            "correction": CorrectionConfig(),
            "rewards": (),
            "draft_head": None,
        }
        for name, value in plain.items():
            if name not in read and getattr(self, name) != value:
                raise ConfigError(
                    f'[{name}] means nothing to algorithm = "{self.algorithm}", which reads '
                    f"{', '.join(read) or 'none of them'}: leave it out, or choose another algorithm"
                )

    def _check_axes(self) -> None:
        for axis in ("tp", "pp", "sp", "ep"):
            size = getattr(self.parallel, axis)
            if size not in (1, "auto"):
                raise ConfigError(
                    f'parallel.{axis} = {size} is for algorithm = "sft": {self.algorithm} divides work by data and '
                    "weights by ZeRO; set it to 1, and parallel.zero = 3 where the model does not fit one rank"
                )
        if self.elastic.on_spike == "rewind":
            raise ConfigError('elastic.on_spike = "rewind" is for algorithm = "sft": take "skip", or leave it out')

    def _check_play(self) -> None:
        if self.rollout.on_policy and self.rollout.exact and not self.correction.plain:
            raise ConfigError(
                "[correction] makes up for tokens of another policy, and these rollouts are on-policy to the bit: "
                "leave it out, or set rollout.exact = false where this machine's kernels do not keep to that"
            )
        if not self.rewards:
            raise ConfigError(f'algorithm = "{self.algorithm}" needs a [[rewards]] table: what judges the answers?')
        room = self.longest_prompt + self.rollout.max_tokens
        if room > self.data.seq_len:
            raise ConfigError(
                f"data.max_prompt ({self.longest_prompt}) and rollout.max_tokens ({self.rollout.max_tokens}) are more "
                f"than data.seq_len ({self.data.seq_len}): raise it, or shorten one"
            )
        if self.data.micro_tokens is not None and self.data.micro_tokens < room:
            raise ConfigError(f"data.micro_tokens is {self.data.micro_tokens}, less than an answer of {room}: raise it")
        if self.rollout.apart and self.algorithm == "grpo" and self.grpo.dynamic_sampling:
            raise ConfigError(
                "rollout.overlap and rollout.quantization ask a process apart for a step's rollouts all at once, and "
                "grpo.dynamic_sampling asks for more as it sees their rewards: leave one of them out"
            )
        if not self.rollout.on_policy and self.correction.plain and self.rollout.exact:
            raise ConfigError(
                "these rollouts are off-policy (top_p, top_k, kv_dtype, quantization or overlap): say with "
                '[correction] what makes up for it, such as level = "token", or set rollout.exact = false to go without'
            )
