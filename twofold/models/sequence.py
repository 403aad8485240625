"""Sequence parallel: ranks that hold a part of every sequence, each another AttnContext; the decoder does not notice.

    Ulysses (Jacobs et al. 2023): tokens are exchanged for heads, attention is whole, and back again
        [T/N, H] ─▶ all-to-all ─▶ [T, H/N] ─▶ attention ─▶ all-to-all ─▶ [T/N, H]
    ring (Liu et al. 2023): keys and values go round, see `ring.py`; for more ranks than key-value heads

The flat axis is cut at equal tokens wherever sequences lie; positions and masks come from where each token stands.

Shapes: T tokens of all ranks, L = T/N of this one, H query heads, K key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..core import ConfigError
from ..kernels.attention import Attend, packed_attention
from ..parallel import comm
from .context import AttnContext
from .ring import Places, ring_attention
from .spec import ModelSpec


class DividedContext(AttnContext, Protocol):
    """An AttnContext of a part of the tokens."""

    places_T: Tensor | None

    def mine(self, x_T: Tensor) -> Tensor:
        """This rank's rows [L, ...] of what all ranks have [T, ...]."""
        ...


class UlyssesContext:
    """This rank's L tokens of sequences of `lengths`, whose sum divides evenly. Implements DividedContext."""

    places_T: Tensor | None = None

    def __init__(self, lengths: Sequence[int], group: dist.ProcessGroup) -> None:
        self.lengths, self.group = tuple(lengths), group
        self.positions_T = self.mine(torch.cat([torch.arange(n) for n in lengths]))

    def mine(self, x_T: Tensor) -> Tensor:
        return comm.part_of(x_T, self.group, 0)

    def attend(self, layer: int, q_LHD: Tensor, k_LKD: Tensor, v_LKD: Tensor, how: Attend) -> Tensor:
        ranks, rank, heads = self.group.size(), self.group.rank(), q_LHD.shape[1]
        q_THD, k_TKD, v_TKD = (self._tokens(x) for x in (q_LHD, k_LKD, v_LKD))
        if how.slopes is not None:
            own = heads // ranks
            how = replace(how, slopes=how.slopes[rank * own : (rank + 1) * own])
        if how.sparse is not None:
            how = replace(how, sparse=how.sparse.part(rank, ranks))
        mixed_THD = packed_attention(q_THD, k_TKD, v_TKD, self.lengths, how)
        return self._heads(mixed_THD)

    def _tokens(self, x_LHD: Tensor) -> Tensor:
        """All tokens of this rank's heads: [L, H, D] to [T, H/N, D]."""
        ranks = self.group.size()
        L, H, D = x_LHD.shape
        parts = x_LHD.view(L, ranks, H // ranks, D).transpose(0, 1).reshape(ranks * L, H // ranks, D)
        return comm.exchange(parts, self.group, [L] * ranks, [L] * ranks)

    def _heads(self, x_THD: Tensor) -> Tensor:
        """All heads of this rank's tokens: [T, H/N, D] to [L, H, D]."""
        ranks = self.group.size()
        T, H, D = x_THD.shape
        back = comm.exchange(x_THD, self.group, [T // ranks] * ranks, [T // ranks] * ranks)
        return back.view(ranks, T // ranks, H, D).transpose(0, 1).reshape(T // ranks, ranks * H, D)


class RingContext:
    """This rank's tokens, two pieces from either end, so that all ranks look back as far. Implements DividedContext.

    T   | 0 | 1 | 2 | 3 | 3 | 2 | 1 | 0 |      4 ranks
    """

    places_T: Tensor | None = None

    def __init__(self, lengths: Sequence[int], group: dist.ProcessGroup) -> None:
        self.group = group
        positions = torch.cat([torch.arange(n) for n in lengths])
        owners = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        order = [self._rows(len(positions), rank) for rank in range(group.size())]
        self.places = [Places(owners[rows], positions[rows]) for rows in order]
        self._own = order[group.rank()]
        self.positions_T = positions[self._own]

    def _rows(self, tokens: int, rank: int) -> Tensor:
        pieces = torch.arange(tokens).chunk(2 * self.group.size())
        return torch.cat([pieces[rank], pieces[2 * self.group.size() - 1 - rank]])

    def mine(self, x_T: Tensor) -> Tensor:
        return x_T[self._own]

    def attend(self, layer: int, q_LHD: Tensor, k_LKD: Tensor, v_LKD: Tensor, how: Attend) -> Tensor:
        return ring_attention(q_LHD, k_LKD, v_LKD, self.places, how, self.group)


def check(spec: ModelSpec, ranks: int, kind: str) -> None:
    """Raises ConfigError when a model's heads cannot be divided among sequence parallel ranks; it names what can."""
    if kind != "ulysses":
        return
    for index, layer in enumerate(spec.layers):
        heads, kv_heads = layer.mixer.heads, layer.mixer.kv_heads
        if heads % ranks or kv_heads % ranks:
            legal = [n for n in range(1, kv_heads + 1) if heads % n == 0 and kv_heads % n == 0]
            nearest = min(legal, key=lambda n: (abs(n - ranks), n))
            raise ConfigError(
                f"parallel.sp = {ranks} with ulysses cannot be: layer {index} has {heads} query heads and {kv_heads} "
                f'key-value heads; the nearest that can is {nearest}, or take sp_kind = "ring"'
            )
