"""The first weights of a fresh model: each tensor a function of (seed, its name), whatever order they are filled in."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import nn

from ..models.decoder import Decoder, Normalise, Weight

STD = 0.02
RESIDUAL = ("out", "down")
"""Projections that write to the residual stream; they start smaller, by the square root of how many there are."""


@torch.no_grad()
def init_weights(decoder: Decoder, seed: int, done: Callable[..., None] | None = None) -> None:
    """Fill every parameter: matrices from N(0, 0.02²), scaled for residual projections (GPT-2), norms to identity.

    `done` is told of those of each module when they are filled.
    """
    scale = (2 * len(decoder.spec.layers)) ** -0.5
    for name, module in decoder.named_modules():
        if isinstance(module, Weight):
            std = STD * (scale if name.rsplit(".", 1)[-1] in RESIDUAL else 1.0)
            _normal(module.weight, std, seed, f"{name}.weight")
        elif isinstance(module, Normalise) and module.weight is not None:
            module.weight.fill_(0.0 if module.spec.offset else 1.0)
        if isinstance(module, Weight | Normalise) and module.bias is not None:
            module.bias.zero_()
        if done is not None:
            done(*module.parameters(recurse=False))


def _normal(weight: nn.Parameter, std: float, seed: int, name: str) -> None:
    key = hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8]
    generator = torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
    weight.copy_(torch.empty(weight.shape, dtype=torch.float32).normal_(0.0, std, generator=generator))
