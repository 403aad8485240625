"""Recomputation: what of each layer is kept for the backward pass, and where (see `policies.py` for the words).

    layer.forward ──── keeper's hooks ──── checkpoint (full) ──┬─ attention ── checkpoint (attention)
                       or recipes (selective)                  └─ ffn ──────── checkpoint (ffn)

Methods of the layers are replaced on the instance: no module is wrapped, so parameters keep their names, and a sharded
layer gathers its weights around all of it. The forward is deterministic, so every policy gives the same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..models.decoder import Decoder
from .kept import Keeper, OnDevice
from .policies import per_layer
from .selective import CHEAP, Recipes


def recompute_layers(
    decoder: Decoder, policy: str = "full", changes: Mapping[str, str] | None = None, keeper: Keeper | None = None
) -> None:
    """Give every layer its policy, in place; `changes` says which layers have another ("0-3": "full").

    `keeper` holds the activations that remain; without one they stay where autograd leaves them.

    Raises:
        ConfigError: a policy or a layer that there is not.
    """
    for layer, own in zip(decoder.layers, per_layer(policy, len(decoder.layers), changes), strict=True):
        target: Any = layer  # whose methods are hidden by attributes of the same name
        if own in ("attention", "ffn"):
            setattr(target, own, _again(getattr(target, own)))
        elif own == "full":
            target.forward = _again(target.forward)
        if own == "selective" or keeper is not None:
            cheap = CHEAP if own == "selective" else ()
            target.forward = functools.partial(_held, target.forward, keeper or OnDevice(), cheap)


def _again(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`run`, whose backward pass runs it once more and keeps its arguments alone (Chen et al. 2016)."""
    return functools.partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)


def _held(run: Callable[..., Tensor], keeper: Keeper, cheap: Collection[str], *args: Any) -> Tensor:
    """`run`, what it saves in the keeper's care, and what `cheap` ops make kept as recipes."""
    if not torch.is_grad_enabled():
        return run(*args)
    with Recipes(keeper, cheap).entered():
        return run(*args)
