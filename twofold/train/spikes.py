"""Spikes: losses far above those before them, found by a rule that every rank and every resumed run agrees on."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from statistics import median

from .elastic import ElasticConfig


class Spikes:
    """The last `window` losses that were no spikes, and whether the next one is: above `spike_factor` x their median.

    Their whole state is those losses, which a checkpoint's position keeps.
    """

    def __init__(self, config: ElasticConfig | None = None, recent: Sequence[float] = ()) -> None:
        self.config = config or ElasticConfig()
        self.recent = deque(recent, maxlen=self.config.window)

    def look(self, loss: float) -> str | None:
        """Why this loss is a spike; one that is none, and finite, is remembered."""
        if self.config.on_spike == "none" or not math.isfinite(loss):
            return None
        usual = median(self.recent) if len(self.recent) == self.config.window else math.inf
        if loss > self.config.spike_factor * usual:
            return (
                f"the loss, {loss:.4g}, is more than {self.config.spike_factor:g} times {usual:.4g}, the median of "
                f"the last {self.config.window}"
            )
        self.recent.append(loss)
        return None

    def state(self) -> list[float]:
        """What a checkpoint keeps."""
        return list(self.recent)
