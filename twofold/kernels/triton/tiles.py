"""Which tile a matrix product runs in, so that a row's bits never depend on how many rows stand beside it.

The definition of a product is one tile for each shape and type of the weights: it adds up the inner dimension INNER
numbers at a time, in the order that the tensor core's instruction has (after "Defeating Nondeterminism in LLM
Inference", Thinking Machines 2025). Few rows waste most of such a tile, so narrower ones may stand in, but only where
this device was seen, at the shape's first use, to give the definition's bits: another height may mean another
instruction. An order of additions does not depend on the data, so one comparison on random numbers decides.

    rows     1..16       17..64      more
    tile     16 rows     64 rows     the definition
             if alike, else the definition
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows and columns of the result that one program makes, and how many inputs it takes at a time."""

    rows: int
    columns: int
    inner: int
    warps: int = 4
    stages: int = 3

    def shared(self, itemsize: int) -> int:
        """Bytes of on-chip memory that its operands take while they are fetched ahead."""
        return self.stages * self.inner * (self.rows + self.columns) * itemsize


class Kind(NamedTuple):
    """What decides a tile: the weights' shape [N, K], their bits (0: plain) and group, and the activations' type.

    `group` is how many inputs share a scale, 0 for all or none; `dynamic` means int8 activations.
    """

    columns: int
    inner: int
    bits: int
    group: int
    dynamic: bool
    dtype: torch.dtype
    device: str


@cache
def definition(kind: Kind) -> Tile:
    """The one tile that defines the bits of this kind of product."""
    wide = kind.dtype == torch.float32 and not kind.dynamic
    inner = min(kind.group or 64, 32 if wide and not kind.bits else 64)
    if wide:
        return Tile(64, 64, inner, 4, 2)
    columns = 256 if kind.columns >= 2048 and not kind.bits else 128
    return _fitting(Tile(128, columns, inner, 8, 3), kind)


@cache
def narrow(kind: Kind) -> tuple[Tile, ...]:
    """Tiles for few rows, the narrowest first; columns so few that every processor has work."""
    inner = definition(kind).inner
    columns = 32 if kind.columns <= 8192 else 64
    return _fitting(Tile(16, columns, inner, 4, 5), kind), _fitting(Tile(64, 64, inner, 4, 4), kind)


def choose(kind: Kind, rows: int, run: Callable[[Tensor, Kind, Tile], Tensor]) -> Tile:
    """The tile for a product of `rows` rows; `run` makes one of noise [M, K], to see whether a tile is alike."""
    whole = definition(kind)
    for tile in narrow(kind):
        if rows <= tile.rows < whole.rows and _alike(kind, tile, whole, run):
            return tile
    return whole


_seen: dict[tuple[Kind, Tile], bool] = {}


def _alike(kind: Kind, tile: Tile, whole: Tile, run: Callable[[Tensor, Kind, Tile], Tensor]) -> bool:
    """Whether `tile` gives every row of the definition's tile the definition's bits."""
    part = kind._replace(columns=min(kind.columns, 256))
    if (part, tile) not in _seen:
        generator = torch.Generator().manual_seed(kind.inner)
        x_MK = torch.randn(whole.rows, kind.inner, generator=generator).to(kind.device, kind.dtype)
        truth = run(x_MK, part, whole)
        got = torch.cat([run(rows, part, tile) for rows in x_MK.split(tile.rows)])
        _seen[part, tile] = torch.equal(got, truth)
    return _seen[part, tile]


def _fitting(tile: Tile, kind: Kind) -> Tile:
    """The same order of additions with fewer stages or columns, where the device's on-chip memory is small."""
    limit, itemsize = _shared_memory(kind.device), 2 if kind.dynamic else kind.dtype.itemsize
    while tile.shared(itemsize) > limit and (tile.stages > 2 or tile.columns > 32):
        if tile.stages > 2:
            tile = replace(tile, stages=tile.stages - 1)
        else:
            tile = replace(tile, columns=tile.columns // 2, warps=4)
    return tile


@cache
def _shared_memory(device: str) -> int:
    if torch.device(device).type != "cuda":
        return 1 << 20  # Triton's interpreter
    properties = torch.cuda.get_device_properties(torch.device(device))
    return int(getattr(properties, "shared_memory_per_block_optin", 99 * 1024))
