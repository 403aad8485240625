"""What a checkpoint asks of its sampler when the caller says nothing: generation_config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..core import CheckpointError

_KEYS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def sampling_defaults(folder: str | Path) -> dict[str, Any]:
    """Fields of SamplingParams that the checkpoint in `folder` sets; `do_sample: false` said aloud means greedy.

    A key that is absent or null is left to SamplingParams, as vLLM does.

    Raises:
        CheckpointError: a generation_config.json that is not a JSON table.
    """
    path = Path(folder) / "generation_config.json"
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(table, dict):
        raise CheckpointError(f"{path} is not a JSON table")
    if table.get("do_sample") is False:
        return {"temperature": 0.0}
    return {key: table[key] for key in _KEYS if table.get(key) is not None}
