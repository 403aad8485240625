"""A layout as the kernels read it: for each block of queries and each 128 keys a byte, a bit for each 16 of them.

    bits[pattern][query block][128 keys]      00000111  10000000  00000000  ...      keys 0..47 and 240..255

Whatever the layout's block is, a multiple of 16, an absent panel of 16 keys is never multiplied, and 128 keys without a
bit are never looked at: neither read, nor asked for ahead of time, nor folded.

Shapes: P patterns (heads of one pattern see the same), I query blocks, B blocks of 128 keys, H heads, K key-value
heads x G, S sequences, L queries of each, N keys of a block.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from ..core import ConfigError
from ..core.sparse import PANEL, Layout
from . import stages

BYTE = 8 * PANEL  # keys that a byte tells of: the KEYS of the walk
AT_ONCE = 512


@dataclass(frozen=True, slots=True)
class Sparse:
    """A layout for so many heads of one layer, and positions up to `length`.

    `first_head` is the number of the first among all the model's heads, where tensor parallelism has cut them.
    """

    layout: Layout
    heads: int
    length: int
    first_head: int = 0

    def table(self, device: torch.device | str = "cpu") -> Table:
        """The layout on a device; made once and kept."""
        return _table(self, torch.device(device))

    def part(self, rank: int, ranks: int) -> Sparse:
        """The same for the heads of one rank of a tensor parallel group."""
        heads = self.heads // ranks
        return replace(self, heads=heads, first_head=self.first_head + rank * heads)

    def fits(self, positions: int) -> None:
        """Raises ConfigError when a sequence has more positions than the layout was made for."""
        if positions > self.length:
            raise ConfigError(
                f"a sequence of {positions} tokens; this sparse layout was made for {self.length}: build the model "
                "for a longer context (max_len)"
            )


@dataclass(frozen=True, slots=True)
class Table:
    """bits [P, I, B] uint8 and pattern [H] int32; see the picture above."""

    bits_PIB: Tensor
    pattern_H: Tensor
    block: int

    def struct(self) -> stages.Sparse:
        """The same as an argument of the CPU kernels, valid for as long as this lives."""
        _, rows, stride = self.bits_PIB.shape
        return stages.Sparse(self.bits_PIB.data_ptr(), self.pattern_H.data_ptr(), self.block, rows, stride)

    def parts(self) -> tuple[Tensor, Tensor, int, int, int]:
        """Bits, patterns, block, rows and bytes of a row, as the Triton kernel takes them."""
        return self.bits_PIB, self.pattern_H, self.block, *self.bits_PIB.shape[1:]

    def starts(self, first: int, last: int, oldest: int = 0) -> list[int]:
        """The first keys of the blocks of 128 that any head of the queries first..last-1 sees, from `oldest` on."""
        rows = self.bits_PIB[:, first // self.block : (last - 1) // self.block + 1]
        found: list[int] = rows[..., oldest // BYTE : -(-last // BYTE)].amax((0, 1)).nonzero().flatten().tolist()
        return [oldest - oldest % BYTE + start * BYTE for start in found]

    def absent(self, query_SL: Tensor, key_N: Tensor, kv_heads: int) -> Tensor:
        """Which keys each query lacks, both given by their positions: [S, K, L, G, N]."""
        byte_PSLN = self.bits_PIB[:, query_SL[..., None] // self.block, key_N // BYTE]
        absent_PSLN = (byte_PSLN >> (key_N % BYTE // PANEL).to(torch.uint8) & 1) == 0
        absent_KGSLN: Tensor = absent_PSLN[self.pattern_H.long()].unflatten(0, (kv_heads, -1))
        return absent_KGSLN.permute(2, 0, 3, 1, 4)


@lru_cache(maxsize=64)
def _table(sparse: Sparse, device: torch.device) -> Table:
    if device.type != "cpu":
        made = sparse.table()
        return Table(made.bits_PIB.to(device), made.pattern_H.to(device), made.block)
    layout = sparse.layout
    every = [layout.pattern(head) for head in range(sparse.first_head, sparse.first_head + sparse.heads)]
    patterns = sorted(set(every))
    rows = max(1, -(-sparse.length // layout.block))
    bits = torch.stack([_bits(layout, pattern, rows) for pattern in patterns])
    numbers = torch.tensor([patterns.index(pattern) for pattern in every], dtype=torch.int32, device="cpu")
    return Table(bits, numbers, layout.block)


def _bits(layout: Layout, pattern: int, rows: int) -> Tensor:
    """One pattern's bytes [I, B]."""
    width, each = -(-rows // 8), layout.block // PANEL
    out = torch.empty(rows, -(-rows * layout.block // BYTE), dtype=torch.uint8, device="cpu")
    place_8 = torch.arange(8, device="cpu")
    for first in range(0, rows, AT_ONCE):
        some = range(first, min(first + AT_ONCE, rows))
        raw = bytearray().join(layout.row(pattern, i).to_bytes(width, "little") for i in some)
        blocks = torch.frombuffer(raw, dtype=torch.uint8).view(len(some), width, 1) >> place_8 & 1
        panels = blocks.flatten(1)[:, :rows].repeat_interleave(each, 1)
        panels = torch.nn.functional.pad(panels, (0, out.shape[1] * 8 - panels.shape[1]))
        out[first : some.stop] = (panels.unflatten(1, (-1, 8)) << place_8).sum(-1).to(torch.uint8)
    return out
