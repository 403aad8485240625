"""What a step did, and how fast steps are."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one step did: mean loss in nats a target, targets, gradient norm before the clip, and why it was skipped.

    `overflow`: because the loss scale was too large, which happens now and then, and has been seen to.
    """

    loss: float
    targets: int
    lr: float
    grad_norm: float
    tokens: int = 0
    flops: int = 0
    skipped: str | None = None
    overflow: bool = False
    figures: dict[str, float] = field(default_factory=dict)
    """What else the journal keeps: how a mixture's experts were used, what was rewarded."""

    @property
    def diverged(self) -> bool:
        """Whether its loss or gradient was not finite, or its loss a spike."""
        return self.skipped is not None and self.targets > 0 and not self.overflow


class Clock:
    """Time spent stepping, without validation, samples and saves; smoothed over about twenty steps."""

    def __init__(self) -> None:
        self.seconds_per_step = 0.0
        self.tokens_per_second = 0.0
        self.flops_per_second = 0.0
        self._began = 0.0

    def start(self) -> None:
        self._began = time.perf_counter()

    def stop(self, tokens: int, flops: int = 0) -> None:
        seconds = max(time.perf_counter() - self._began, 1e-9)
        self.seconds_per_step = _smooth(self.seconds_per_step, seconds)
        self.tokens_per_second = _smooth(self.tokens_per_second, tokens / seconds)
        self.flops_per_second = _smooth(self.flops_per_second, flops / seconds)


def _smooth(old: float, new: float) -> float:
    return old + (new - old) * 0.1 if old else new
