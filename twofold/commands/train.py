"""`twofold train`: a recipe run by the trainer; the serving engine speaks its samples on the weights in training.

The trainer may not know the engine (they are siblings), so the door hands it a function.
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Sequence
from typing import Any

from ..core import ConfigError
from ..engine.config import EngineConfig
from ..engine.engine import Engine
from ..engine.request import Request
from ..engine.sampling import SamplingParams
from ..models.decoder import Decoder
from ..train.config import SampleConfig
from ..train.launch import run


def train(recipe: str, changes: Sequence[str], fresh: bool, profiles: Collection[str] = ()) -> int:
    """Run the recipe from where it was left; exit code 0 when it is finished, 75 when it was stopped and saved."""
    return run(recipe, dict(map(parse_change, changes)), fresh=fresh, sampler=sample, profiles=profiles)


def parse_change(text: str) -> tuple[str, Any]:
    """ "optimizer.lr=3e-4" as a dotted key and a value, read as TOML where it is TOML, else as plain text."""
    key, sign, value = text.partition("=")
    if not sign or not key.strip():
        raise ConfigError(f"--set takes key=value, such as optimizer.lr=3e-4, not '{text}'")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value.strip()


def sample(
    decoder: Decoder, prompts: Sequence[list[int]], settings: SampleConfig, eos_ids: tuple[int, ...]
) -> list[list[int]]:
    """The new ids of each prompt, from an engine on the decoder's own weights; its cache lives for this call alone.

    Seeded by the engine's counter-based numbers, so that sampling leaves the run's own random state untouched.
    """
    size = 16
    kept = [tuple(prompt[-(decoder.max_len - 1) :]) for prompt in prompts]
    lengths = [min(decoder.max_len, len(prompt) + settings.max_tokens) for prompt in kept]
    config = EngineConfig(
        block_size=size,
        num_blocks=sum(-(-length // size) for length in lengths),
        max_num_seqs=len(kept),
        max_num_batched_tokens=max(512, len(kept)),
        enable_prefix_caching=False,
    )
    engine = Engine(decoder, config, eos_ids=eos_ids)
    params = SamplingParams(temperature=settings.temperature, max_tokens=settings.max_tokens, seed=0)
    found: dict[str, list[int]] = {}
    for number, prompt in enumerate(kept):
        found[str(number)] = []
        engine.submit(Request(id=str(number), prompt_ids=prompt, params=params, sample=number))
    while engine.has_work:
        for output in engine.step():
            found[output.request_id] += [token.id for token in output.tokens]
    return list(found.values())
