"""Twofold trains, aligns and serves large language models with one decoder, one set of weights, one set of kernels.

    from twofold import LLM, SamplingParams
    LLM("path/to/checkpoint").generate(["def fib(n):"], SamplingParams(max_tokens=64))

Public names are fetched when first used, so that `import twofold` stays free of torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine.config import EngineConfig
    from .engine.engine import Engine
    from .engine.llm import LLM
    from .engine.sampling import SamplingParams
    from .models.inject import init_inference
    from .models.weights import load
    from .train.deepspeed import initialize
    from .train.trainer import Trainer

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "Engine",
    "EngineConfig",
    "SamplingParams",
    "Trainer",
    "__version__",
    "init_inference",
    "initialize",
    "load",
]

_HOMES = {
    "LLM": ".engine.llm",
    "Engine": ".engine.engine",
    "EngineConfig": ".engine.config",
    "SamplingParams": ".engine.sampling",
    "Trainer": ".train.trainer",
    "init_inference": ".models.inject",
    "initialize": ".train.deepspeed",
    "load": ".models.weights",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'twofold' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
