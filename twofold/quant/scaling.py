"""Channels made larger in one place and smaller in the next: the same model, which rounds better.

    AWQ (Lin et al. 2023)            s_j = mean|x_j|^α, α searched: weights that meet large inputs get finer steps
    SmoothQuant (Xiao et al. 2022)   s_j = max|x_j|^α / max|w_j|^(1−α): outliers move from activations into weights

Shapes: N outputs, K inputs, C channels of the source, S sampled rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .format import Format

STEPS = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Fold:
    """Where a channel's scale can move: out of a `source` (a norm, or the rows of a weight), into readers' columns.

    `divide(s_C)` makes the source's channels smaller and returns what they were divided by after rounding. `channel_K`
    says which channel a reader's input comes from. `listen` names the site whose inputs are looked at. `readers` are
    the weights to be rounded, with their formats; `others` read the same inputs and stay float. `norm` says that the
    source is one.
    """

    listen: str
    divide: Callable[[Tensor], Tensor]
    channel_K: Tensor
    readers: Sequence[tuple[Tensor, Format]]
    others: Sequence[Tensor] = ()
    norm: bool = True

    def apply(self, s_C: Tensor) -> None:
        """Divide the source and multiply the readers."""
        s_K = self.divide(s_C)[self.channel_K]
        for weight in (*(reader for reader, _ in self.readers), *self.others):
            weight.copy_(weight.float() * s_K)

    def pooled(self, x_K: Tensor, reduce: str) -> Tensor:
        """One number a channel from one an input, where several inputs come from one channel."""
        out_C = x_K.new_zeros(int(self.channel_K.max()) + 1)
        return out_C.scatter_reduce(0, self.channel_K, x_K, reduce, include_self=False)


def awq_scales(fold: Fold, magnitude_K: Tensor, rows_SK: Tensor) -> Tensor:
    """The scales of AWQ: the power of the inputs' mean magnitude with the least error on the sampled rows."""
    mean_C = fold.pooled(magnitude_K, "mean").clamp_min(1e-6)
    best_C, least = torch.ones_like(mean_C), torch.inf
    truth = [rows_SK @ _flat(weight).t() for weight, _ in fold.readers]
    for step in range(STEPS):
        s_C = mean_C ** (step / STEPS)
        s_C = s_C / (s_C.max() * s_C.min()).sqrt()
        s_K = s_C[fold.channel_K]
        error = 0.0
        for (weight, format), right in zip(fold.readers, truth, strict=True):
            rounded = format.quantize(_flat(weight) * s_K).dequantize() / s_K
            error += float((rows_SK @ rounded.t() - right).square().sum())
        if error < least:
            best_C, least = s_C, error
    return best_C


def smooth_scales(fold: Fold, top_K: Tensor, alpha: float) -> Tensor:
    """The scales of SmoothQuant, kept within a range that bf16 norms hold well."""
    top_C = fold.pooled(top_K, "amax").clamp_min(1e-5)
    weights = [_flat(weight) for weight, _ in fold.readers]
    widest_K = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    widest_C = fold.pooled(widest_K, "amax").clamp_min(1e-5)
    return (top_C**alpha / widest_C ** (1 - alpha)).clamp(1e-3, 1e3)


def _flat(weight: Tensor) -> Tensor:
    """[..., N, K] as one tall [N, K] in fp32: experts under each other."""
    return weight.detach().float().flatten(0, -2)
