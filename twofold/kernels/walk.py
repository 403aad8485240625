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

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .rows import by_rows

KEYS = 128
_NOTHING = -1e30  # the largest score of a query that has seen no key yet: finite, so that it never makes a NaN


@dataclass(frozen=True, slots=True)
class Attend:
    """How one layer looks back: score scale, sliding window, soft cap on scores, and one ALiBi slope a head.

    `kept` is what keys and values are kept in where that is narrower than what they come in: bf16, or int8 with a scale
    for each token and head, where queries are rounded alike.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    slopes: tuple[float, ...] | None = None
    kept: torch.dtype | None = None


@dataclass(slots=True)
class Fold:
    """Running result of a walk: largest score m [B·K, M, 1], sum l [B·K, M, 1], values o [B·K, M, D], all fp32."""

    m: Tensor
    l: Tensor  # noqa: E741
    o: Tensor

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
    q_ZMD: Tensor, k_ZND: Tensor, hidden_BLN: Tensor | None, gap_BLN: Tensor | None, how: Attend, clear: int = 0
) -> Tensor:
    """Scores of one block [Z, M, N]: capped, biased by distance, and -inf where hidden. q is scaled already."""
    return biased(by_rows(q_ZMD, k_ZND.mT), hidden_BLN, gap_BLN, how, clear)


def biased(s_ZMN: Tensor, hidden_BLN: Tensor | None, gap_BLN: Tensor | None, how: Attend, clear: int = 0) -> Tensor:
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
    if hidden_BLN is not None:
        B, L = clear + hidden_BLN.shape[0], hidden_BLN.shape[1]
        s_BKLGN = s_ZMN.view(B, Z // B, L, M // L, N)
        s_BKLGN[clear:].masked_fill_(hidden_BLN[:, None, :, None, :], -torch.inf)
    return s_ZMN


def look(v_ZND: Tensor, s_ZMN: Tensor) -> Fold:
    """What one block of keys gives each query."""
    m_ZM1 = s_ZMN.amax(-1, keepdim=True).clamp_min(_NOTHING)
    p_ZMN = s_ZMN.sub_(m_ZM1).exp_()
    l_ZM1 = p_ZMN.sum(-1, keepdim=True)
    return Fold(m_ZM1, l_ZM1, by_rows(p_ZMN, v_ZND))


def mask(qpos_BL: Tensor, start: int, count: int, window: int | None) -> tuple[Tensor, Tensor]:
    """Which of the keys start..start+count-1 each query may not see, and the distances k - q."""
    kpos_N = torch.arange(start, start + count, device=qpos_BL.device)
    gap_BLN = kpos_N - qpos_BL[:, :, None]
    hidden_BLN = gap_BLN > 0
    if window is not None:
        hidden_BLN |= gap_BLN <= -window
    return hidden_BLN, gap_BLN


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
        for start in blocks_of(first, last, how.window):
            hidden, gap = tile_mask(first, last, start, KEYS, B, how, q_ZMD.device)
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


def blocks_of(first: int, last: int, window: int | None) -> range:
    """Starts of the key blocks of which queries first..last-1 see anything."""
    oldest = 0 if window is None else max(0, first - window + 1)
    return range(oldest - oldest % KEYS, last, KEYS)


def tile_mask(
    first: int, last: int, start: int, count: int, batch: int, how: Attend, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """`mask` for queries first..last-1 of every sequence; None where it would hide nothing and no distance counts."""
    partly = start + count > first + 1 or (how.window is not None and start <= last - 1 - how.window)
    if not partly and how.slopes is None:
        return None, None
    hidden, gap = mask(torch.arange(first, last, device=device).expand(batch, -1), start, count, how.window)
    return (hidden if partly else None), (gap if how.slopes is not None else None)
