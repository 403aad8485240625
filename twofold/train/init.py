"""The first weights of a fresh model: each tensor a function of (seed, its name), whatever order they are filled in."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..models.decoder import Decoder
from ..models.scoring import TENSOR
from ..models.seeds import source
from ..models.tensors import Normalise, Weight

STD = 0.02
RESIDUAL = ("out", "down")
"""Projections that write to the residual stream; they start smaller, by the square root of how many there are."""


@torch.no_grad()
def init_weights(decoder: Decoder, seed: int, done: Callable[..., None] | None = None) -> None:
    """Fill every parameter: matrices from N(0, 0.02²), scaled for residual projections (GPT-2), norms to identity, a
    score head to zeros (`models/scoring.py` says why).

    `done` is told of each when it is filled.
    """
    first = FirstWeights(decoder, seed)
    for name, parameter in decoder.named_parameters():
        parameter.copy_(first[name])
        if done is not None:
            done(parameter)


class FirstWeights:
    """The first value of each parameter by name, in fp32, made when asked for; `decoder` needs no memory."""

    def __init__(self, decoder: Decoder, seed: int) -> None:
        self._seed, self._scale = seed, (2 * len(decoder.spec.layers)) ** -0.5
        self._modules = dict(decoder.named_modules())

    def __getitem__(self, name: str) -> Tensor:
        place, _, kind = name.rpartition(".")
        module = self._modules[place]
        out = torch.empty(getattr(module, kind).shape, dtype=torch.float32)
        if kind == "bias" or name == TENSOR:
            return out.zero_()
        if isinstance(module, Normalise):
            return out.fill_(0.0 if module.spec.offset else 1.0)
        assert isinstance(module, Weight), f"{name} has no first value"
        std = STD * (self._scale if place.rsplit(".", 1)[-1] in RESIDUAL else 1.0)
        return out.normal_(0.0, std, generator=source(self._seed, name))
