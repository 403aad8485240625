"""A config as a function that scores a batch."""

from __future__ import annotations

from collections.abc import Callable

from .builtin import one_by_one
from .config import RewardConfig
from .endpoint import Endpoint
from .function import FunctionScorer
from .passes import PassesTests
from .wire import Batch, Scored

Scorer = Callable[[Batch], Scored]

_OTHERS: dict[str, Callable[[RewardConfig], Scorer]] = {
    "function": FunctionScorer,
    "http": Endpoint,
    "python_passes_tests": PassesTests,
}


def build_scorer(config: RewardConfig) -> Scorer:
    """Raises ConfigError, or whatever a user's file raises when it is imported."""
    return _OTHERS.get(config.kind, one_by_one)(config)
