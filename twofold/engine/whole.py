"""WholeTexts: a decoder over whole texts end to end, without a cache of its own.

A layer's keys and values are written to a scratch that the next layer writes over, so what a step needs beside its
hidden states is one layer's, whatever the model's depth. Where the decoder can be compiled it runs as one program.

Shapes: T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from ..kernels import stages
from ..kernels.paged import Panels
from ..models.compile import Program, Spans, why_not
from ..models.decoder import Decoder
from ..models.packed import PackedContext

SIZE = 16  # tokens of a block of the scratch


class WholeTexts:
    """Runs at most `tokens` tokens of at most `texts` texts at once."""

    def __init__(self, decoder: Decoder, *, tokens: int, texts: int) -> None:
        self.decoder, self.tokens, self.texts = decoder, tokens, texts
        self.program: Program | None = None
        self._scratch: dict[tuple[int, int], Panels] = {}

    def compile(self) -> None:
        """Write the program, where there is to be one; anew after weights were replaced."""
        self.program = None
        if why_not(self.decoder):
            return
        blocks = self.tokens // SIZE + self.texts
        mixers = [layer.mixer for layer in self.decoder.spec.layers]
        for mixer in mixers:
            kind = mixer.kv_heads, mixer.head_dim
            if kind not in self._scratch:
                self._scratch[kind] = Panels.zeros(blocks, mixer.kv_heads, SIZE, mixer.head_dim)
        caches: list[stages.Cache] = [self._scratch[mixer.kv_heads, mixer.head_dim].struct() for mixer in mixers]
        self.program = Program(self.decoder, caches, tokens=self.tokens, rows=1)

    def forget(self) -> None:
        """Give the memory back."""
        self.program = None
        self._scratch.clear()

    def __call__(self, ids: Sequence[Sequence[int]], types: Sequence[Sequence[int]]) -> Tensor:
        """Hidden states [T, D] of some texts; `types` are empty where all are 0. Good until the next call."""
        flat = [token for text in ids for token in text]
        kinds = [kind for text, row in zip(ids, types, strict=True) for kind in row or (0,) * len(text)]
        kinds = kinds if any(kinds) else []
        lengths = [len(text) for text in ids]
        if self.program is not None:
            starts = [0] * len(lengths)
            blocks = list(_blocks(lengths))
            return self.program.run(Spans(ids=flat, starts=starts, counts=lengths, blocks=blocks, types=kinds))
        device = self.decoder.device
        types_T = torch.tensor(kinds, device=device) if kinds else None
        ids_T = torch.tensor(flat, device=device)
        hidden_TD: Tensor = self.decoder(ids_T, PackedContext(lengths, device), types_T)
        return hidden_TD


def _blocks(lengths: Sequence[int]) -> Iterator[range]:
    """The scratch's blocks that each text has, one after another."""
    counts = [-(-length // SIZE) for length in lengths]
    for first, count in zip(accumulate(counts, initial=0), counts):
        yield range(first, first + count)
