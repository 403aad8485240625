"""RolloutConfig: how the policy is sampled while it learns; free of torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..core import ConfigError
from .remote_config import RemoteConfig


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """`[rollout]`: answers that the policy gives, and the engine that lets it."""

    max_tokens: int = 128
    """The longest answer."""
    temperature: float = 1.0
    """What the policy is sampled at, and trained at: its log-probabilities are of this distribution."""
    top_p: float = 1.0
    """Less than 1 makes rollouts off-policy: log-probabilities are those of all tokens."""
    top_k: int = 0
    """More than 0 makes rollouts off-policy."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer."""
    ignore_eos: bool = False
    turn: str = ""
    """path/to/file.py:function or package.module:function, what a tool says behind a turn of the policy
    (`align/turns.py`); left out, an answer is one turn."""
    max_turns: int = 8
    """Turns of the policy in an answer, at most, where there is a tool."""
    max_num_seqs: int = 256
    """Answers that are written at once, on each rank."""
    max_num_batched_tokens: int = 2048
    block_size: int = 16
    num_blocks: int | None = None
    """Blocks of the KV cache; left out, as many as a step's answers need, if the machine can spare them."""
    kv_dtype: Literal["float32", "bfloat16", "int8", "fp8"] = "float32"
    """Other than float32 makes rollouts off-policy."""
    quantization: str | None = None
    """Roll out with weights rounded to this number format (int8, int4, ...): off-policy, from a copy."""
    overlap: bool = False
    """Roll out the next step's answers while this one's are learned, in a process with weights of its own, one step
    old: off-policy."""
    remote: RemoteConfig = field(default_factory=RemoteConfig)
    """How that process is started and weights come to it; quantized rollouts have one, too."""
    exact: bool = True
    """Stop a run whose on-policy rollouts have other log-probabilities in the engine than in the trainer."""
    shown: int = 16
    """Answers of each step that the journal keeps, for the page."""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "max_num_seqs", "max_num_batched_tokens", "max_turns"):
            if getattr(self, name) < 1:
                raise ConfigError(f"rollout.{name} must be 1 or more, not {getattr(self, name)}")
        if not 0.0 < self.temperature <= 2.0:
            raise ConfigError(
                f"rollout.temperature must be more than 0 and at most 2, not {self.temperature}: greedy answers are "
                "all alike, and teach nothing"
            )
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"rollout.top_p must be more than 0 and at most 1, not {self.top_p}")

    @property
    def apart(self) -> bool:
        """Whether rollouts come from a process with weights of its own."""
        return self.overlap or self.quantization is not None

    @property
    def on_policy(self) -> bool:
        """Whether the trainer's policy is exactly what is sampled."""
        plain = self.top_p == 1.0 and self.top_k <= 0 and self.kv_dtype == "float32"
        return plain and not self.apart
