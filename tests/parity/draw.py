"""What `fuzz_kernels` draws: sizes of 0, 1, odd and huge, tensors that lie oddly, layouts, quantized weights."""

from __future__ import annotations

from random import Random

import torch
from torch import Tensor

from twofold.core.sparse import BigBird, Fixed, Local
from twofold.kernels.blocksparse import Sparse
from twofold.kernels.quantized import Logical, Packed, pack

SIZES = (0, 1, 2, 3, 5, 7, 15, 16, 17, 31, 32, 33, 48, 64, 100, 130, 257)
LARGEST = 300_000  # numbers of one operand


class Draw(Random):
    """Draws sizes, tensors and layouts."""

    def size(self, most: int = 257, least: int = 0) -> int:
        return self.choice([size for size in SIZES if least <= size <= most])

    def rows(self, width: int) -> int:
        """How many rows of `width`: now and then more than one piece of work has."""
        many = self.choice((400, 1500)) if self.random() < 0.1 else self.size()
        return min(many, LARGEST // max(1, width))

    def layout(self, heads: int, length: int) -> Sparse | None:
        """Blocks of keys for positions up to `length` and no further, half the time."""
        block, each = self.choice((16, 32, 48, 64, 128, 256)), self.maybe()
        kinds = (
            Local(block=block),
            Fixed(block=block, num_different_global_patterns=2 if each else 1, different_layout_per_head=each),
            BigBird(block=block, different_layout_per_head=each, seed=self.randrange(100)),
        )
        return Sparse(self.choice(kinds), heads, length) if self.maybe() else None

    def maybe(self, chance: float = 0.5) -> bool:
        return self.random() < chance

    def floats(self, *shape: int, dtype: torch.dtype = torch.float32, wild: bool = False) -> Tensor:
        """Numbers in memory that ends where the last of them does; rows may be apart, or not at a round address."""
        generator = torch.Generator().manual_seed(self.randrange(2**31))
        values = torch.randn(shape, generator=generator)
        if wild and self.maybe(0.2) and values.numel():
            for value in (torch.nan, torch.inf, -torch.inf, 3e38, -3e38, 1e-42):
                values.view(-1)[self.randrange(values.numel())] = value
        layout = self.randrange(3)
        if layout == 0 or not values.numel():
            return values.to(dtype)
        gap = self.choice((1, 3, 16))
        if layout == 1:
            apart = torch.empty(*shape[:-1], shape[-1] + gap, dtype=dtype)
            return apart[..., gap:].copy_(values)
        shifted = torch.empty(values.numel() + gap, dtype=dtype)
        return shifted[gap:].copy_(values.flatten()).view(shape)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.randrange(2**31))
        return torch.randint(low, high, shape, generator=generator)

    def packed(self, *shape: int) -> Packed:
        """A quantized weight [..., N, K] of random codes."""
        bits, group = self.choice((8, 4)), self.choice((0, 32, 64, 128))
        dtype, low, high = (torch.int8, -127, 128) if bits == 8 else (torch.uint8, 0, 16)
        groups = (*shape[:-1], -(-shape[-1] // group) if group else 1)
        scale = self.integers(1, 99, *groups).to(self.choice((torch.bfloat16, torch.float16, torch.float32))) / 64
        zero = self.integers(low, high, *groups).to(dtype) if self.maybe() else None
        return pack(Logical(self.integers(low, high, *shape).to(dtype), scale, zero), group, self.maybe(0.7))
