"""Recomputation (Chen et al. 2016): keep each layer's input alone, and run the layer again when its gradient is due."""

from __future__ import annotations

import functools

from torch.utils.checkpoint import checkpoint

from ..models.decoder import Decoder


def recompute_layers(decoder: Decoder) -> None:
    """Wrap every layer in place. The forward runs twice with the same bits, so the gradients are those without it."""
    for layer in decoder.layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
