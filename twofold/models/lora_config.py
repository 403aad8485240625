"""What may be said about low-rank adapters; free of torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Beside a frozen weight W, B A is trained: y = W x + scale · B (A x) (Hu et al. 2021).

    There is no dropout: an adapter's bits would then depend on what else has drawn random numbers.
    """

    rank: int = 16
    """Rows of A and columns of B (`r` in PEFT)."""
    alpha: float = 32.0
    """The scale is alpha / rank."""
    rslora: bool = False
    """The scale is alpha / √rank, which keeps larger ranks learning (Kalajdzievski 2023)."""
    targets: tuple[str, ...] = ()
    """Modules by the checkpoint's names: "q_proj", or more of the name; left out, every linear layer of the layers but
    experts and routers."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"lora.rank must be 1 or more, not {self.rank}")
        if not 0.0 < self.alpha < math.inf:
            raise ConfigError(f"lora.alpha must be more than 0, not {self.alpha}")

    @property
    def scale(self) -> float:
        """What B A x is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)
