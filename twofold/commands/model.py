"""Where the bundled model lies, and what a checkpoint says about how it wants to be sampled."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..core import CheckpointError, ConfigError

BUNDLED = Path(__file__).resolve().parents[1] / "assets" / "pybot"

# What transformers' generate samples with when the checkpoint says `do_sample` and no more.
_SAMPLED = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}


def bundled_model() -> Path:
    """The model that comes with the package. Raises ConfigError when this installation has none."""
    if not (BUNDLED / "config.json").is_file():
        raise ConfigError("this installation has no bundled model: name a checkpoint directory with --model")
    return BUNDLED


def model_dir(given: str | None) -> Path:
    """The directory a command was given, or the bundled model's; a GGUF file's stands for the file.

    Raises:
        CheckpointError: it holds no model.
    """
    if given is None:
        return bundled_model()
    place = Path(given)
    if place.suffix == ".gguf" and place.is_file():
        from ..models.gguf import folder_of

        return folder_of(place)
    if not (place / "config.json").is_file():
        raise CheckpointError(f"{place} has no config.json: give the directory of a Hugging Face checkpoint")
    return place


def generate_defaults(model: Path) -> dict[str, Any]:
    """Sampling settings as transformers' `generate` would choose them for this checkpoint: greedy unless told.

    Reads generation_config.json; keys that are not there are left to SamplingParams. The API has other defaults, those
    of its own protocol (`engine/defaults.py`).
    """
    path = model / "generation_config.json"
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        said = {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(said, dict):
        raise CheckpointError(f"{path} holds {type(said).__name__}, not a table")
    found: dict[str, Any] = {"temperature": 0.0}
    if said.get("do_sample"):
        found = {name: said.get(name) if said.get(name) is not None else usual for name, usual in _SAMPLED.items()}
        found |= {"min_p": said["min_p"]} if said.get("min_p") is not None else {}
    if said.get("repetition_penalty") is not None:
        found["repetition_penalty"] = said["repetition_penalty"]
    if said.get("max_new_tokens") is not None:
        found["max_tokens"] = said["max_new_tokens"]
    return found


def served_models(given: Sequence[str]) -> dict[str, Any]:
    """What `twofold serve` was told to serve, as fields of ServeConfig: one directory, or several as NAME=DIR.

    Raises:
        ConfigError: several without names, or a directory that is none.
    """
    named = [word for word in given if "=" in word and not Path(word).is_dir()]
    if not named:
        if len(given) > 1:
            raise ConfigError(f"several models need names: twofold serve a={given[0]} b={given[1]}")
        return {"model": model_dir(given[0] if given else None)}
    if len(named) < len(given):
        raise ConfigError(f"several models are NAME=DIR each: '{next(w for w in given if w not in named)}' has no name")
    parts = [word.partition("=") for word in named]
    models = tuple(f"{name}={model_dir(path)}" for name, _, path in parts)
    return {"model": Path(models[0].partition("=")[2]), "models": models}
