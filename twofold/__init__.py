"""Twofold trains, aligns and serves large language models with one decoder, one set of weights, one set of kernels.

    from twofold import LLM, SamplingParams
    LLM("path/to/checkpoint").generate(["def fib(n):"], SamplingParams(max_tokens=64))

Public names are fetched when first used, so `import twofold` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .engine import LLM, Engine, EngineConfig, SamplingParams
    from .models import load
    from .train import Trainer

__version__ = "0.1.0"

__all__ = ["LLM", "Engine", "EngineConfig", "SamplingParams", "Trainer", "__version__", "load"]

_HOMES = {
    "Engine": "engine",
    "EngineConfig": "engine",
    "LLM": "engine",
    "SamplingParams": "engine",
    "Trainer": "train",
    "load": "models",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'twofold' has no attribute '{name}'")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
