"""Beside: the stages of a program's adapters, which add to what the weight beside them has made.

    deal ▸ ... ▸ qkv ▸ (A of q ▸ + B of q) (A of v ▸ + B of v) ▸ heads ▸ ...

One Deal at the start puts all tokens into one group, or none while the adapters are off, so switching them writes no
program anew. A and B are read where they are, as weights are. The bits are those of `Lora.forward`.

Shapes: T tokens, R rank, N outputs of the weight.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..kernels.grouped import Matrices, Places
from ..kernels.linear import stage_of as linear_stage
from ..kernels.panels import Rounding
from .decoder import Decoder
from .lora import Lora, loras


class Beside:
    """What they work in, for at most `tokens` tokens; next to nothing for a decoder without adapters."""

    def __init__(self, decoder: Decoder, tokens: int) -> None:
        self._loras = list(loras(decoder).values())
        room = tokens if self._loras else 0
        self.places, self.chosen_T = Places(room, 1, 1), torch.zeros(room, dtype=torch.int32)
        self.shrunk_TR = torch.empty(room, max((lora.config.rank for lora in self._loras), default=1))
        self._on = True
        self._kept: list[Matrices] = []

    def switch(self) -> None:
        """Before a step: see whether the adapters are on."""
        if self._loras and self._loras[0].on != self._on:
            self._on = self._loras[0].on
            self.chosen_T.fill_(0 if self._on else -1)

    def deal(self, rows: int) -> list[ctypes.Structure]:
        """What comes before the first layer; `rows` is the address of the row count."""
        return [self.places.deal(self.chosen_T, rows)] if self._loras else []

    def stages_of(
        self, lora: Lora, x_TK: Tensor, y_TN: Tensor, rows: int, rounding: Rounding
    ) -> list[ctypes.Structure]:
        """The stages that add to `y_TN`, in place, what the adapters make of `x_TK`."""
        made: list[ctypes.Structure] = []
        for pair in lora.pairs:
            expand, out = Matrices([pair.b.detach()], scales=[lora.config.scale]), y_TN[:, pair.rows]
            self._kept.append(expand)
            made.append(linear_stage(x_TK, pair.a, None, self.shrunk_TR, rows))
            made += expand.stages_of(self.places, self.shrunk_TR, out, rows, rounding, scatter=True)
        return made
