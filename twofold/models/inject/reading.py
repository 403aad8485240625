"""Reading: what an attention mask says, when it says that each sequence looks back at its own past.

    left padding         right padding        a chunk behind a cache
    . . x                x . .                x x x . .
    . . x x              x x .                x x x x .        x: may look; rows are queries, columns keys
    . . x x x            (nothing, padding)   x x x x x

Anything else (packed texts, prefixes that see each other) is not read, and whoever asked goes another way.

Shapes: B sequences, L queries, S keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Piece:
    """One sequence: queries `first` .. `first + count - 1` look at keys from `pad` on, the last up to `end - 1`."""

    first: int
    count: int
    pad: int
    end: int


def read(mask: Tensor | None, batch: int, queries: int, keys: int, window: int | None) -> list[Piece] | None:
    """A Piece for each sequence, or None when the mask [B, 1, L, S] (bool or added) says something else."""
    if mask is None:
        return [Piece(0, queries, 0, keys)] * batch if queries in (1, keys) else None
    if mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[-2] != queries or mask.shape[-1] < keys:
        return None
    allowed_BLS = mask[:, 0, :, :keys] if mask.dtype == torch.bool else mask[:, 0, :, :keys] >= 0
    if len(allowed_BLS) != batch:
        allowed_BLS = allowed_BLS.expand(batch, -1, -1)
    found = [_piece(allowed_LS, window) for allowed_LS in allowed_BLS]
    return None if any(piece is None for piece in found) else found  # type: ignore[return-value]


def _piece(allowed_LS: Tensor, window: int | None) -> Piece | None:
    queries, keys = allowed_LS.shape
    seeing = allowed_LS.any(-1).nonzero().flatten()
    if not len(seeing):
        return None
    column_S = torch.arange(keys)
    last_L = torch.where(allowed_LS, column_S, -1).amax(-1)
    row = int(seeing[0])
    start = int(last_L[row]) - row  # the position of query 0 among the keys
    if start < 0 or start + queries > keys:
        return None
    pad = int(torch.where(allowed_LS[seeing], column_S, keys).amin())
    position_L = torch.arange(queries) + start
    real_L = (last_L == position_L) & (position_L >= pad)
    count = int(real_L.sum())
    if not bool(real_L[row : row + count].all()) or bool((last_L[row + count :] > start + row + count - 1).any()):
        return None
    rows = slice(row, row + count)
    expected = (column_S >= pad) & (column_S <= position_L[rows, None])
    if window is not None:
        expected &= column_S > position_L[rows, None] - window
    if not torch.equal(expected, allowed_LS[rows]):
        return None
    return Piece(row, count, pad, start + row + count)
