"""BlockContents: a block's bytes out of the KV cache, and into it again.

one block   │ layer 0: keys │ values │ (scales) │ layer 1: keys │ ...    every part as it lies in the cache
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Layers = Sequence[dict[str, Tensor]]


class BlockContents:
    """Copies blocks of the cache whose `layers` those are now; the first dimension of each part is blocks."""

    def __init__(self, layers: Callable[[], Layers]) -> None:
        self._layers = layers
        self.nbytes = sum(_size(part) for part in self._parts())
        """Bytes of one block."""

    @property
    def about(self) -> str:
        """What lies where in these bytes, in words that differ whenever that does."""
        parts = [
            f"{name} {str(part.dtype).removeprefix('torch.')} {'x'.join(map(str, part.shape[1:]))}"
            for layer in self._layers()
            for name, part in layer.items()
        ]
        runs = [f"{parts.count(part)} of {part}" for part in dict.fromkeys(parts)]
        return f"{self._parts()[0].device.type}, {len(self._layers())} layers: " + ", ".join(runs)

    def save(self, blocks: Sequence[int]) -> list[memoryview]:
        """The bytes of each of these blocks, in memory of its own."""
        parts = self._parts()
        if not self._here(parts):
            places = torch.tensor(blocks, dtype=torch.int64, device=parts[0].device)
            rows = torch.cat([_bytes(part)[places] for part in parts], 1).cpu()
            return [row.clone().numpy().data for row in rows]
        contents = [torch.empty(self.nbytes, dtype=torch.uint8) for _ in blocks]
        self._move(parts, blocks, [content.data_ptr() for content in contents], out=True)
        return [content.numpy().data for content in contents]

    def restore(self, blocks: Sequence[int], contents: Sequence[memoryview]) -> None:
        """Put such bytes into these blocks."""
        parts = self._parts()
        rows = [torch.frombuffer(content, dtype=torch.uint8) for content in contents]
        if self._here(parts):
            self._move(parts, blocks, [row.data_ptr() for row in rows], out=False)
            return
        device = parts[0].device
        places = torch.tensor(blocks, dtype=torch.int64, device=device)
        pieces = torch.stack(rows).to(device).split([_size(part) for part in parts], 1)
        for part, piece in zip(parts, pieces, strict=True):
            _bytes(part)[places] = piece

    def _move(self, parts: Sequence[Tensor], blocks: Sequence[int], addresses: Sequence[int], *, out: bool) -> None:
        """On the host a block is a few runs of some kilobytes: starting threads for that takes longer than the copy."""
        at = 0
        for part in parts:
            size, begin = _size(part), part.data_ptr()
            for block, address in zip(blocks, addresses, strict=True):
                here, there = begin + block * size, address + at
                ctypes.memmove(*((there, here) if out else (here, there)), size)
            at += size

    def _here(self, parts: Sequence[Tensor]) -> bool:
        return parts[0].device.type == "cpu"

    def _parts(self) -> list[Tensor]:
        return [part for layer in self._layers() for part in layer.values()]


def _size(part: Tensor) -> int:
    """Bytes of one block in this part."""
    return part.stride(0) * part.itemsize


def _bytes(part: Tensor) -> Tensor:
    """A part as bytes, a row for each block."""
    return part.view(len(part), -1).view(torch.uint8)
