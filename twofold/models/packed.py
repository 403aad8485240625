"""PackedContext: whole sequences end to end on the token axis, as training and scoring see them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..kernels.attention import Attend, packed_attention


class PackedContext:
    """Sequences of `lengths` tokens that fill the flat axis, none looking at another. Implements AttnContext.

    `kv_dtype` rounds keys and values as an engine does whose cache is kept in it, so that both have the same bits.
    `places_T` is where each token stands in its training step's batch (`Batch.places`), whatever part of it is here.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        device: torch.device | str = "cpu",
        kv_dtype: torch.dtype | None = None,
        places_T: Tensor | None = None,
    ) -> None:
        self.lengths, self.places_T = tuple(lengths), places_T
        self.kv_dtype = kv_dtype
        places = [torch.arange(n, device=device) for n in self.lengths]
        self.positions_T = torch.cat(places) if places else torch.empty(0, dtype=torch.int64, device=device)

    def attend(self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, how: Attend) -> Tensor:
        if self.kv_dtype is not None and self.kv_dtype != k_TKD.dtype:
            how = replace(how, kept=self.kv_dtype)
        return packed_attention(q_THD, k_TKD, v_TKD, self.lengths, how)
