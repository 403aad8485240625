"""Attention as a walk over blocks of keys that start at multiples of KEYS in absolute position.

    keys     |0 ........ 127|128 ....... 255|256 ....... 383|
    query i  |==== fold ====|==== fold =====|== i           |     one order of additions for every query, whether it is
                                                                  decoded alone, prefilled in a chunk, or trained

Each block gives a query its largest score m, the sum l of exp(score - m) and the weighted values o; neighbouring
results are folded as in online softmax (Milakov and Gimelshein 2018; FlashAttention, Dao et al. 2022). A block in which
a query sees nothing folds to exactly what was there, so it does not matter who else made the walk longer.

Shapes: B sequences, L queries of each, H query heads = K key-value heads x G, D head size, N keys of a block,
M = L·G rows, Z = B·K.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import ConfigError
from .blocksparse import Sparse
from .rows import by_rows

KEYS = 128
_NOTHING = -1e30  # the largest score of a query that has seen no key yet: finite, so that it never makes a NaN


@dataclass(frozen=True, slots=True)
class Attend:
    """How one layer looks back: score scale, sliding window, soft cap on scores, and one ALiBi slope a head.

    `sparse` says which blocks of keys are there at all, `blocksparse.py`.
    Without `causal` a query sees what comes after it too, up to its sequence's end or as far as a window reaches back.
    `kept` is what keys and values are kept in where that is narrower than what they come in: bf16, or int8 with a scale
    for each token and head, where queries are rounded alike.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    slopes: tuple[float, ...] | None = None
    kept: torch.dtype | None = None
    sparse: Sparse | None = None
    causal: bool = True

    def end(self, last: int, length: int) -> int:
        """The first key that query `last` - 1 of a sequence of `length` does not see any more."""
        if self.causal:
            return last
        return length if self.window is None else min(length, last + self.window - 1)


@dataclass(slots=True)
class Fold:
    """Running result of a walk: largest score m [B·K, M, 1], sum l [B·K, M, 1], values o [B·K, M, D], all fp32."""

    m: Tensor
    l: Tensor  # noqa: E741
    o: Tensor

    @staticmethod
    def nothing(q_ZMD: Tensor) -> Fold:
        """What queries that have seen no key yet begin with."""
        zero_ZM1 = q_ZMD.new_zeros(*q_ZMD.shape[:2], 1)
        return Fold(torch.full_like(zero_ZM1, _NOTHING), zero_ZM1, torch.zeros_like(q_ZMD))

    def add(self, other: Fold, first: int) -> None:
        """Fold the next block into the leading `first` of B·K sequences."""
        m, l, o = self.m[:first], self.l[:first], self.o[:first]  # noqa: E741
        top = torch.maximum(m, other.m)
        old, new = torch.exp(m - top), torch.exp(other.m - top)
        l.copy_(l * old + other.l * new)
        o.copy_(o * old + other.o * new)
        m.copy_(top)


def grouped(x_BLHD: Tensor, kv_heads: int) -> Tensor:
    """Queries of the heads that share keys, side by side as rows: [B, L, H, D] to [B·K, L·G, D]."""
    B, L, H, D = x_BLHD.shape
    return x_BLHD.view(B, L, kv_heads, H // kv_heads, D).permute(0, 2, 1, 3, 4).reshape(B * kv_heads, -1, D)


def ungrouped(x_ZMD: Tensor, batch: int, heads: int) -> Tensor:
    """The way back: [B·K, L·G, D] to [B, L, H, D]."""
    kv_heads, D = x_ZMD.shape[0] // batch, x_ZMD.shape[-1]
    x = x_ZMD.view(batch, kv_heads, -1, heads // kv_heads, D)
    return x.permute(0, 2, 1, 3, 4).reshape(batch, -1, heads, D)


def scores(
    q_ZMD: Tensor, k_ZND: Tensor, hidden: Tensor | None, gap_BLN: Tensor | None, how: Attend, clear: int = 0
) -> Tensor:
    """Scores of one block [Z, M, N]: capped, biased by distance, and -inf where hidden. q is scaled already."""
    return biased(by_rows(q_ZMD, k_ZND.mT), hidden, gap_BLN, how, clear)


def biased(s_ZMN: Tensor, hidden: Tensor | None, gap_BLN: Tensor | None, how: Attend, clear: int = 0) -> Tensor:
    """Raw scores [Z, M, N] capped, biased by distance and -inf where hidden; may write into them.

    The first `clear` sequences see the whole block, and `hidden` is of those after them; `gap` is of all.
    """
    Z, M, N = s_ZMN.shape
    if how.softcap is not None:
        s_ZMN = how.softcap * torch.tanh(s_ZMN / how.softcap)
    if how.slopes is not None and gap_BLN is not None:
        B, L, _ = gap_BLN.shape
        slopes_KG = torch.tensor(how.slopes, device=s_ZMN.device).view(Z // B, M // L)
        s_BKLGN = s_ZMN.view(B, Z // B, L, M // L, N)
        s_ZMN = (s_BKLGN + slopes_KG[None, :, None, :, None] * gap_BLN[:, None, :, None, :]).view(Z, M, N)
    if hidden is not None:
        B, L = clear + hidden.shape[0], hidden.shape[2]
        s_BKLGN = s_ZMN.view(B, Z // B, L, M // L, N)
        s_BKLGN[clear:].masked_fill_(hidden, -torch.inf)
    return s_ZMN


def look(v_ZND: Tensor, s_ZMN: Tensor) -> Fold:
    """What one block of keys gives each query."""
    m_ZM1 = s_ZMN.amax(-1, keepdim=True).clamp_min(_NOTHING)
    p_ZMN = s_ZMN.sub_(m_ZM1).exp_()
    l_ZM1 = p_ZMN.sum(-1, keepdim=True)
    return Fold(m_ZM1, l_ZM1, by_rows(p_ZMN, v_ZND))


def mask(qpos_BL: Tensor, start: int, count: int, how: Attend, kv_heads: int, length: int = 0) -> tuple[Tensor, Tensor]:
    """Which of the keys start..start+count-1, all of one block, each query may not see, and the distances k - q.

    `length` is that of the sequences, for queries that look ahead.
    The first is [B, K, L, G, N], or [B, 1, L, 1, N] where all heads are alike; the second [B, L, N].
    """
    kpos_N = torch.arange(start, start + count, device=qpos_BL.device)
    gap_BLN = kpos_N - qpos_BL[:, :, None]
    hidden_BLN = gap_BLN > 0 if how.causal else (kpos_N >= length).expand_as(gap_BLN).clone()
    if how.window is not None:
        if not how.causal:
            hidden_BLN |= gap_BLN >= how.window
        hidden_BLN |= gap_BLN <= -how.window
    hidden = hidden_BLN[:, None, :, None]
    if how.sparse is not None:
        hidden = hidden | how.sparse.table(qpos_BL.device).absent(qpos_BL, kpos_N, kv_heads)
    return hidden, gap_BLN


def walk(q_BLHD: Tensor, k_BLKD: Tensor, v_BLKD: Tensor, how: Attend) -> tuple[Tensor, Tensor]:
    """Attention of B whole sequences of one length: values [B, L, H, D] and log-sum-exp [B·K, L·G, 1], fp32.

    KEYS queries at a time, so that a tile of scores stays in the processor's cache, and masks are made only where a
    tile lies on the diagonal or on the window's edge.
    """
    B, L, H, _ = q_BLHD.shape
    K = k_BLKD.shape[2]
    q_BLHD = q_BLHD * how.scale
    pad = (0, 0, 0, 0, 0, -L % KEYS)
    k_ZND, v_ZND = (
        [block.contiguous() for block in F.pad(x, pad).transpose(1, 2).flatten(0, 1).split(KEYS, 1)]
        for x in (k_BLKD, v_BLKD)
    )
    out: list[Tensor] = []
    lse: list[Tensor] = []
    for first in range(0, L, KEYS):
        last = min(first + KEYS, L)
        q_ZMD = grouped(q_BLHD[:, first:last], K)
        folded: Fold | None = None
        for start in blocks_of(first, last, how, L):
            hidden, gap = tile_mask(first, last, start, KEYS, B, how, K, q_ZMD.device, L)
            block = start // KEYS
            seen = look(v_ZND[block], scores(q_ZMD, k_ZND[block], hidden, gap, how))
            if folded is None:
                folded = seen
            else:
                folded.add(seen, B * K)
        assert folded is not None
        out.append(ungrouped(folded.o / folded.l, B, H))
        lse.append(folded.m + torch.log(folded.l))
    return torch.cat(out, 1), torch.cat(lse, 1)


def fits(how: Attend, ends: Iterable[int]) -> None:
    """Raises ConfigError when a sequence that ends there has positions that the sparse layout was not made for.

    Layouts are of queries that look back, so one that looks ahead has none.
    """
    if how.sparse is not None and not how.causal:
        raise ConfigError("a sparse layout is of causal attention: leave sparse_attention out of an encoder's config")
    if how.sparse is not None:
        how.sparse.fits(max(ends, default=0))


def blocks_of(first: int, last: int, how: Attend, length: int = 0) -> Sequence[int]:
    """Starts of the key blocks of which queries first..last-1 of a sequence of `length` see anything."""
    oldest = 0 if how.window is None else max(0, first - how.window + 1)
    if how.sparse is None:
        return range(oldest - oldest % KEYS, how.end(last, length), KEYS)
    return how.sparse.table().starts(first, last, oldest)


def tile_mask(
    first: int,
    last: int,
    start: int,
    count: int,
    batch: int,
    how: Attend,
    kv_heads: int,
    device: torch.device,
    length: int,
) -> tuple[Tensor | None, Tensor | None]:
    """`mask` for queries first..last-1 of every sequence; None where it would hide nothing and no distance counts."""
    partly = start + count > how.end(first + 1, length) or (how.window is not None and start <= last - 1 - how.window)
    partly |= how.sparse is not None
    if not partly and how.slopes is None:
        return None, None
    qpos_BL = torch.arange(first, last, device=device).expand(batch, -1)
    hidden, gap = mask(qpos_BL, start, count, how, kv_heads, length)
    return (hidden if partly else None), (gap if how.slopes is not None else None)
