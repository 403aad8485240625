"""Beside: the stages of a program's adapters, which add to what the weight beside them has made.

    deal ▸ ... ▸ qkv ▸ (A of q ▸ + B of q) (A of v ▸ + B of v) ▸ heads ▸ ...

One Deal at the start puts all tokens into one group, or none while the adapters are off, so switching them writes no
program anew. Where a served model has slots, it deals each token to its slot's group, and the stages are those of
`kernels/slotted.py`. A and B are read where they are, as weights are. The bits are those of `Lora.forward`.

Shapes: T tokens, R rank, N outputs of the weight.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.grouped import Matrices, Places
from ..kernels.linear import stage_of as linear_stage
from ..kernels.panels import Rounding
from . import adapters
from .decoder import Decoder
from .lora import Lora, loras


class Beside:
    """What they work in, for at most `tokens` tokens; next to nothing for a decoder without adapters."""

    def __init__(self, decoder: Decoder, tokens: int) -> None:
        self._loras = list(loras(decoder).values())
        self.slots = next((m.slots for m in decoder.modules() if isinstance(m, adapters.Beside)), None)
        room = tokens if self._loras or self.slots else 0
        self.places = Places(room, 1, self.slots.count if self.slots else 1)
        self.chosen_T = torch.zeros(room, dtype=torch.int32)
        ranks = [lora.config.rank for lora in self._loras] + ([self.slots.widest] if self.slots else [])
        self.shrunk_TR = torch.empty(room, max(ranks, default=1))
        self._on = True
        self._kept: list[Matrices] = []

    def switch(self) -> None:
        """Before a step: see whether the adapters are on."""
        if self._loras and self._loras[0].on != self._on:
            self._on = self._loras[0].on
            self.chosen_T.fill_(0 if self._on else -1)

    def seat(self, counts: Sequence[int], slots: Sequence[int]) -> None:
        """Before a step with adapters in it: each span's slot, from 1 on, 0 for none."""
        of_T = array("i", (slot - 1 for count, slot in zip(counts, slots, strict=True) for _ in range(count)))
        ctypes.memmove(self.chosen_T.data_ptr(), of_T.buffer_info()[0], len(of_T) * of_T.itemsize)

    def deal(self, rows: int) -> list[ctypes.Structure]:
        """What comes before the first layer; `rows` is the address of the row count."""
        return [self.places.deal(self.chosen_T, rows)] if self._loras or self.slots else []

    def stages_of(
        self, lora: Lora | adapters.Beside, x_TK: Tensor, y_TN: Tensor, rows: int, rounding: Rounding
    ) -> list[ctypes.Structure]:
        """The stages that add to `y_TN`, in place, what the adapters make of `x_TK`."""
        made: list[ctypes.Structure] = []
        if isinstance(lora, adapters.Beside):
            return [*lora.slotted.stages_of(self.places, x_TK, self.shrunk_TR, y_TN)]
        for pair in lora.pairs:
            expand, out = Matrices([pair.b.detach()], scales=[lora.config.scale]), y_TN[:, pair.rows]
            self._kept.append(expand)
            made.append(linear_stage(x_TK, pair.a, None, self.shrunk_TR, rows))
            made += expand.stages_of(self.places, self.shrunk_TR, out, rows, rounding, scatter=True)
        return made
