"""What an engine is to be for a checkpoint, decided from its files before anything is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..core import ConfigError
from ..models.families import ENCODERS
from ..models.scoring import CAUSAL
from ..models.sentences import MODULES, longest
from .config import EngineConfig


def decided(config: EngineConfig, folder: str | Path, table: object) -> EngineConfig:
    """The settings with `runner` decided, and for a pooling one the context that its texts were cut to in training.

    `table` is the checkpoint's config.json.

    Raises:
        ConfigError: settings of pooling for a model that only generates, or of generation for one that does not.
    """
    names = table.get("architectures") if isinstance(table, dict) else None
    name = str(names[0]) if isinstance(names, list) and names else ""
    speechless = name in ENCODERS or name in CAUSAL
    runner = config.runner
    if runner == "auto":
        embeds = config.convert == "none" and (Path(folder) / MODULES).is_file()
        runner = "pooling" if speechless or embeds else "generate"
    if runner == "generate" and config.pooling != "auto" and config.convert == "none":
        raise ConfigError("--pooling is for embeddings: add --runner pooling, or --convert embed beside generation")
    if runner == "pooling" and config.convert != "none":
        raise ConfigError(f"--convert {config.convert} adds to generation, and {name} makes no text here: leave it out")
    told = longest(folder) if runner == "pooling" and config.max_model_len is None else None
    context = table.get("max_position_embeddings") if isinstance(table, dict) else None
    if told is not None and isinstance(context, int) and told < context:
        config = replace(config, max_model_len=told)
    return replace(config, runner=runner)


def step_tokens(config: EngineConfig, longest: int) -> int:
    """Tokens of a pooling step at most: the budget, or the longest text where that is more, since it is not cut."""
    return max(config.max_num_batched_tokens, longest)
