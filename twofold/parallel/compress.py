"""Narrow numbers on the wire: what FSDP2 gathers and reduces, as blocks of small integers with a scale each.

    gather    shard ─▶ int8 codes, a scale for 256 ─▶ all ranks ─▶ floats            qwZ (Wang et al. 2023)
    reduce    gradient + what was lost before ─▶ codes ─▶ each rank its part of all ─▶ floats, added      qgZ
              └──────────── what is lost now ◀─────┘   with "onebit": signs and a mean (1-bit Adam, Tang et al. 2021)

    bytes of a number   gather   reduce
    plain               4        4
    int8                1.016    1.016
    int4                1.016    0.516
    onebit              4        0.14

All ranks read the same bytes, so all have the same floats. Sums are taken in fp32 by the rank that owns them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .comm import all_gather, sum_scatter

BLOCK = 256
Kind = Literal["int8", "int4", "onebit"]


class Code(Protocol):
    """Floats [R, n] to bytes [R, m] and back, n a multiple of BLOCK."""

    def write(self, x: Tensor) -> Tensor: ...

    def read(self, data: Tensor) -> Tensor: ...


class Integers:
    """Signed integers of 8 or 4 bits and an fp32 scale for each block: x is about code · scale."""

    def __init__(self, bits: Literal[4, 8]) -> None:
        self.bits, self.top = bits, 2 ** (bits - 1) - 1

    def write(self, x: Tensor) -> Tensor:
        blocks = x.reshape(len(x), -1, BLOCK)
        scale = blocks.abs().amax(-1, keepdim=True) / self.top
        codes = (blocks / torch.where(scale > 0, scale, 1.0)).round_().to(torch.int8).view(torch.uint8)
        if self.bits == 4:
            codes = (codes[..., 0::2] & 15) | (codes[..., 1::2] << 4)
        return torch.cat([codes.flatten(1), scale.flatten(1).view(torch.uint8)], 1)

    def read(self, data: Tensor) -> Tensor:
        each = BLOCK * self.bits // 8
        blocks = data.shape[1] // (each + 4)
        codes, scale = data[:, : blocks * each], data[:, blocks * each :].contiguous().view(torch.float32)
        if self.bits == 4:
            # the sign of a nibble is its highest bit: shifted to the top and back down again
            low, high = (codes << 4).view(torch.int8) >> 4, codes.view(torch.int8) >> 4
            codes = torch.stack([low, high], -1).flatten(1)
        floats = codes.view(torch.int8).reshape(len(data), blocks, BLOCK).float() * scale[..., None]
        return floats.flatten(1)


class Signs:
    """One bit a number and the mean of their sizes for each block: x is about ±mean."""

    def __init__(self) -> None:
        self._places = 2 ** torch.arange(8, dtype=torch.uint8)

    def write(self, x: Tensor) -> Tensor:
        blocks = x.reshape(len(x), -1, BLOCK)
        bits = (x >= 0).reshape(len(x), -1, 8).to(torch.uint8) * self._places
        mean = blocks.abs().mean(-1)
        return torch.cat([bits.sum(-1, dtype=torch.uint8), mean.view(torch.uint8)], 1)

    def read(self, data: Tensor) -> Tensor:
        blocks = data.shape[1] // (BLOCK // 8 + 4)
        bits, mean = data[:, : blocks * BLOCK // 8], data[:, blocks * BLOCK // 8 :].contiguous().view(torch.float32)
        signs = ((bits[..., None] & self._places) > 0).reshape(len(data), blocks, BLOCK).float() * 2 - 1
        return (signs * mean[..., None]).flatten(1)


class _Plugin:
    """What FSDP2 asks of a collective besides calling it: memory to work in."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class NarrowGather(_Plugin):
    """An all-gather whose parts travel as int8."""

    def __init__(self) -> None:
        self.code = Integers(8)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        sent = self.code.write(_padded(input_tensor.float()[None]))
        come = sent.new_empty(group.size(), sent.shape[1])
        all_gather(come, sent, group=group)
        floats = self.code.read(come)[:, : input_tensor.numel()]
        output_tensor.copy_(floats.reshape(output_tensor.shape))


class NarrowReduce(_Plugin):
    """A reduce-scatter whose parts travel narrow; what rounding loses is added to the next gradient (`feedback`).

    One for each group of parameters, since each remembers what it lost. The first `warmup` calls travel whole.
    """

    def __init__(self, kind: Kind, warmup: int = 0) -> None:
        self.code: Code = Signs() if kind == "onebit" else Integers(8 if kind == "int8" else 4)
        self.feedback, self.left = kind == "onebit", warmup
        self.lost: Tensor | None = None

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: object = None,
        async_op: bool = False,
    ) -> None:
        if self.left:
            self.left -= 1
            sum_scatter(output_tensor, input_tensor, group=group)
            return
        parts = _padded(input_tensor.float().reshape(group.size(), -1))
        if self.lost is not None:
            parts = parts + self.lost
        sent = self.code.write(parts)
        if self.feedback:
            self.lost = parts - self.code.read(sent)
        come = torch.empty_like(sent)
        dist.all_to_all_single(come, sent, group=group)
        output_tensor.copy_(self.code.read(come).sum(0)[: output_tensor.numel()].reshape(output_tensor.shape))


def _padded(x: Tensor) -> Tensor:
    """Rows filled up to whole blocks."""
    return F.pad(x, (0, -x.shape[1] % BLOCK))
