"""What of a layer is kept for its backward pass and what is run again: the words of a recipe, free of torch.

    none        everything is kept
    selective   norms, activations and turns are run again; products and attention are kept
    attention   the attention half is run again from the layer's input
    ffn         the feed-forward half is run again from its input
    full        the layer is run again from its input (Chen et al. 2016)
    every-K     full for layers 0, K, 2K, ... and none between

All of them give the same gradients to the last bit. Selective recomputation: Korthikanti et al. 2022.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal, cast

from ..core import ConfigError, unknown

Policy = Literal["none", "selective", "attention", "ffn", "full"]
Place = Literal["device", "host", "disk"]

POLICIES: tuple[Policy, ...] = ("none", "selective", "attention", "ffn", "full")
EVERY = "every-K"


def per_layer(policy: str, layers: int, changes: Mapping[str, str] | None = None) -> list[Policy]:
    """One policy for each of `layers` layers: `policy`, but what `changes` says of "3" or "0-3", in their order.

    Raises:
        ConfigError: a policy, a range or a layer that there is not.
    """
    every = period(policy)
    found: list[Policy] = [_at(i, policy, every) for i in range(layers)]
    for key, other in (changes or {}).items():
        first, last = span(key)
        if last >= layers:
            raise ConfigError(f"model.recompute_layers: '{key}', but the last of the model's {layers} is {layers - 1}")
        other_every = period(other)
        for i in range(first, last + 1):
            found[i] = _at(i, other, other_every)
    return found


def check(policy: str, changes: Mapping[str, object]) -> None:
    """Raises ConfigError for words that no model could be given."""
    period(policy)
    for key, other in changes.items():
        span(key)
        if not isinstance(other, str):
            raise ConfigError(f"model.recompute_layers: '{key}' must be a policy such as \"full\", not {other!r}")
        period(other, f"model.recompute_layers.{key}")


def period(policy: str, where: str = "model.recompute") -> int:
    """K of "every-K", 0 for a policy by name. Raises ConfigError for anything else."""
    if policy in POLICIES:
        return 0
    found = re.fullmatch(r"every-([1-9]\d*)", policy)
    if found:
        return int(found.group(1))
    if policy.startswith("every"):
        raise ConfigError(f"{where}: '{policy}' must be every-K with K of 1 or more, such as every-2")
    raise ConfigError(f"{where}: " + unknown("policy", policy, [*POLICIES, EVERY]))


def span(key: str) -> tuple[int, int]:
    """First and last layer of "5" or "0-3". Raises ConfigError."""
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", key)
    first, last = (int(found.group(1)), int(found.group(2) or found.group(1))) if found else (1, 0)
    if last < first:
        raise ConfigError(f"model.recompute_layers: '{key}' must be a layer or a range, such as 5 or 0-3")
    return first, last


def _at(layer: int, policy: str, every: int) -> Policy:
    if every:
        return "none" if layer % every else "full"
    return cast(Policy, policy)
