"""Matrix products in which a row's bits do not depend on how many rows stand beside it.

A library's product of 1 row, 5 rows and 500 rows may add up the inner dimension in different orders, and so may one
thread and four, so the same token would get other bits in another batch. The definition here is a product of exactly
`tile` rows; other row counts, and batches of products, are used only where this machine was seen to give the
definition's bits for that shape. A library's order of additions does not depend on the data, so one comparison on
random numbers, made at the shape's first use, decides.

    rows     1..4   5..8   9..16   17..24  ...   8192   more
    padded    4      8      16      24     ...   8192   cut into pieces of 8192, then the rest

The tile is the first of TILES whose rows keep their bits wherever they stand in it, for 1, 2 and 4 threads alike. Where
no tile is alike for all of these, one that is so for each by itself will do, and `thread_exact` says no.

Shapes: Z products side by side, M rows, K inner, N columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

TILES = (16, 32, 64, 8, 4)
COUNTS = (4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 320, 384, 512, 640, 768, 896, 1024, 2048, 4096, 8192)
THREADS = (1, 2, 4)


class Kind(NamedTuple):
    """One kind of product: how the right-hand side lies in memory (as [K, N] or as [N, K]), its shape and type."""

    layout: Literal["KN", "NK"]
    inner: int
    columns: int
    dtype: torch.dtype
    device: str

    def noise(self, batch: int, rows: int) -> tuple[Tensor, Tensor]:
        """Random operands: [batch, rows, K] and [batch, K, N] in this layout."""
        generator = torch.Generator(device="cpu").manual_seed(rows)
        x = torch.randn(batch, rows, self.inner, generator=generator)
        shape = (self.inner, self.columns) if self.layout == "KN" else (self.columns, self.inner)
        w = torch.randn(batch, *shape, generator=generator).to(self.device, self.dtype)
        return x.to(self.device, self.dtype), w if self.layout == "KN" else w.mT


def kind_of(w: Tensor) -> Kind:
    """The kind of product that has `w` [..., K, N] on its right."""
    layout: Literal["KN", "NK"] = "KN" if w.stride(-1) == 1 else "NK"
    return Kind(layout, w.shape[-2], w.shape[-1], w.dtype, w.device.type)


def by_rows(x: Tensor, w: Tensor) -> Tensor:
    """x [M, K] by w [K, N], or Z such products side by side: every row with the bits of the definition."""
    kind = kind_of(w)
    rows, batch = x.shape[-2], 0 if x.dim() == 2 else min(x.shape[0], 4)
    if not _measured.tile(kind):
        return torch.cat([_alone(row, w) for row in x.split(1, -2)], -2)
    count = _measured.padded(rows, batch, kind)
    if not count:  # here products side by side have other bits than one at a time
        return torch.stack([by_rows(one, right) for one, right in zip(x, w, strict=True)])
    if rows == count:
        return x @ w
    if rows < count:
        return (F.pad(x, (0, 0, 0, count - rows)) @ w)[..., :rows, :]
    first = x[..., :count, :].contiguous() @ w
    out = first.new_empty(*first.shape[:-2], rows, first.shape[-1])
    out[..., :count, :] = first
    for at in range(count, rows, count):
        out[..., at : at + count, :] = by_rows(x[..., at : at + count, :].contiguous(), w)
    return out


def by_tiles(x_MK: Tensor, w_KN: Tensor) -> Tensor:
    """The definition: a tile of rows at a time."""
    tile = _measured.tile(kind_of(w_KN))
    if not tile:
        return torch.cat([_alone(row, w_KN) for row in x_MK.split(1)])
    pieces = [F.pad(piece, (0, 0, 0, tile - len(piece))) for piece in x_MK.split(tile)]
    return torch.cat([piece @ w_KN for piece in pieces])[: len(x_MK)]


def thread_exact(w: Tensor) -> bool:
    """Whether products by `w` were seen to have the same bits for every number of threads on this machine."""
    return _measured.threads_alike(kind_of(w))


def _alone(row: Tensor, w: Tensor) -> Tensor:
    """A row at the head of a tile of zeros: for the rare shape whose bits depend on the place in every tile."""
    pad = F.pad(row, (0, 0, 0, TILES[0] - 1))
    if row.dim() == 2:
        return (pad @ w)[:1]
    return torch.stack([(one @ right)[:1] for one, right in zip(pad, w, strict=True)])


class Measured:
    """What this machine was seen to do, for each kind of product."""

    def __init__(self) -> None:
        self._tiles: dict[Kind, tuple[int, bool]] = {}
        self._good: dict[tuple[int, int, int, Kind], bool] = {}

    def tile(self, kind: Kind) -> int:
        """The rows of the definition's tile; 0 when in every tile a row's bits depend on its place."""
        return self._tile(kind)[0]

    def threads_alike(self, kind: Kind) -> bool:
        return self._tile(kind)[1]

    def _tile(self, kind: Kind) -> tuple[int, bool]:
        if kind not in self._tiles:
            still = [tile for tile in TILES if _keeps_its_place(tile, kind)]
            alike = [tile for tile in still if _threads_alike(tile, kind)]
            self._tiles[kind] = ((alike or still or [0])[0], bool(alike))
        return self._tiles[kind]

    def padded(self, rows: int, batch: int, kind: Kind) -> int:
        """The row count to run `rows` at: the smallest good one that holds them and wastes little, else a part.

        Beyond 1024 rows at most an eighth may be padding. 0: no count is good for a batch.
        """
        for count in COUNTS:
            if rows <= count and (count <= 1024 or count - rows <= count // 8) and self.good(count, batch, kind):
                return count
        for count in reversed(COUNTS):
            if count <= rows and self.good(count, batch, kind):
                return count
        tile = self.tile(kind)
        return tile if self.good(tile, batch, kind) else 0

    def good(self, count: int, batch: int, kind: Kind) -> bool:
        """Whether `batch` products of `count` rows side by side (0: one alone) have the definition's bits."""
        key = (count, batch, torch.get_num_threads(), kind)
        found = self._good.get(key)
        if found is None:
            found = self._good[key] = _agrees(count, batch, self.tile(kind), kind)
        return found


def _agrees(count: int, batch: int, tile: int, kind: Kind) -> bool:
    rows = max(count, 2 * tile)
    rows += -rows % tile
    with torch.no_grad():
        x, w = kind.noise(max(batch, 1), rows)
        truth = torch.stack([_tiles(one, right, tile) for one, right in zip(x, w, strict=True)])
        starts = [0] if count > tile else range(rows - count + 1)
        for at in starts:
            piece = x[:, at : at + count].contiguous()
            got = piece @ w if batch else (piece[0] @ w[0])[None]
            if not torch.equal(got, truth[:, at : at + count]):
                return False
    return True


def _keeps_its_place(tile: int, kind: Kind) -> bool:
    """Whether a row has the same bits wherever it stands in the tile."""
    with torch.no_grad():
        x, w = (operand[0] for operand in kind.noise(1, 3 * tile))
        truth = _tiles(x, w, tile)
        return all(torch.equal(x[at : at + tile] @ w, truth[at : at + tile]) for at in range(2 * tile + 1))


def _threads_alike(tile: int, kind: Kind) -> bool:
    with torch.no_grad():
        x, w = (operand[0] for operand in kind.noise(1, tile))
        products = []
        for threads in THREADS:
            with _threads(threads):
                products.append(x @ w)
        return all(torch.equal(product, products[0]) for product in products)


def _tiles(x_MK: Tensor, w_KN: Tensor, tile: int) -> Tensor:
    return torch.cat([piece.contiguous() @ w_KN for piece in x_MK.split(tile)])


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


_measured = Measured()
