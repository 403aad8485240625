"""Matrix products in which a row's bits do not depend on how many rows stand beside it.

A library's product of 1 row, 5 rows and 500 rows may add up the inner dimension in different orders, so the same token
would get other bits in another batch. The definition here is a product of exactly TILE rows; bigger and smaller row
counts are used only where this machine was seen to give the definition's bits for that shape. A library's order of
additions does not depend on the data, so one comparison on random numbers, made at the shape's first use, decides.

    rows     1..4   5..8   9..16   17..24  ...   8192   more
    padded    4      8      16      24     ...   8192   cut into pieces of 8192, then the rest
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

TILE = 16
COUNTS = (4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 320, 384, 512, 640, 768, 896, 1024, 2048, 4096, 8192)

Product = Callable[[Tensor], Tensor]


class RowCounts:
    """Remembers, for each kind of product, which row counts give the bits of TILE-row products here."""

    def __init__(self) -> None:
        self._same: dict[Hashable, bool] = {}

    def padded(self, rows: int, key: Hashable, product: Product, like: Tensor) -> int:
        """The row count to run `rows` at: the smallest good one that holds them and wastes little, else a part.

        Beyond 1024 rows a count must divide what is there well: at most an eighth of it may be padding.
        """
        for count in COUNTS:
            if rows <= count and (count <= 1024 or count - rows <= count // 8) and self.good(count, key, product, like):
                return count
        for count in reversed(COUNTS):
            if count <= rows and self.good(count, key, product, like):
                return count
        return TILE

    def good(self, count: int, key: Hashable, product: Product, like: Tensor) -> bool:
        """Whether a product of `count` rows has the definition's bits; measured at the first question.

        For TILE itself the question is whether a row keeps its bits wherever it stands in the tile.
        """
        full = (count, key, like.dtype, like.device.type, torch.get_num_threads())
        if full not in self._same:
            self._same[full] = _agrees(count, product, like)
        return self._same[full]


def _agrees(count: int, product: Product, like: Tensor) -> bool:
    rows = max(count, 2 * TILE)
    rows += -rows % TILE
    noise = torch.Generator(device="cpu").manual_seed(count)
    shape = (*like.shape[:-2], rows, like.shape[-1])
    x = torch.randn(shape, generator=noise).to(like.device, like.dtype)
    with torch.no_grad():
        truth = torch.cat([product(piece.contiguous()) for piece in x.split(TILE, -2)], -2)
        if count > TILE:
            return torch.equal(product(x[..., :count, :].contiguous()), truth[..., :count, :])
        moved = [x[..., at : at + count, :] for at in range(rows - count + 1)]
        return all(torch.equal(product(m.contiguous()), truth[..., i : i + count, :]) for i, m in enumerate(moved))


_counts = RowCounts()


def by_rows(product: Product, x: Tensor, key: Hashable) -> Tensor:
    """`product(x)` for a product that works on each row of x [..., M, K] alone, with the contract's bits.

    `key` names the kind of product and its shapes, so that what was measured is remembered.
    """
    rows = x.shape[-2]
    if not _counts.good(TILE, key, product, x):
        return _one_by_one(product, x)
    count = _counts.padded(rows, key, product, x)
    if rows == count:
        return product(x)
    if rows < count:
        return product(torch.nn.functional.pad(x, (0, 0, 0, count - rows)))[..., :rows, :]
    first = product(x[..., :count, :].contiguous())
    out = first.new_empty(*first.shape[:-2], rows, first.shape[-1])
    out[..., :count, :] = first
    for at in range(count, rows, count):
        piece = x[..., at : at + count, :].contiguous()
        out[..., at : at + count, :] = by_rows(product, piece, key)
    return out


def _one_by_one(product: Product, x: Tensor) -> Tensor:
    """Each row alone at the head of a tile: for the rare shape whose bits depend on the place in a tile."""
    pad = (0, 0, 0, TILE - 1)
    return torch.cat([product(torch.nn.functional.pad(row, pad))[..., :1, :] for row in x.split(1, -2)], -2)
