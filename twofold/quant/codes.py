"""Quantized: a weight as whole numbers, and how real numbers become them.

A scale is chosen first, rounded up to its own dtype so that nothing falls off the end of the codes, and then the codes.

    symmetric int8    |w| ≤ 127 s
    symmetric int4    −8 s ≤ w ≤ 7 s, and s may be negative: the longer side gets the eighth step
    with zeros        s (least − zero) ≤ w ≤ s (most − zero)

Shapes: N outputs, K inputs, G groups of k inputs; experts have one more dimension in front.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kernels import quantized as kernel

if TYPE_CHECKING:
    from .format import Format

SHRINK = tuple(1.0 - 0.04 * step for step in range(1, 11))
"""How much smaller than lossless a scale may be, when clipping a few weights serves the others."""


@dataclass(frozen=True, slots=True)
class Quantized:
    """w = scale · (code − zero): `codes` int8 or uint8 (0..15) [N, K], `scale` [N, G], `zero` [N, G] or None."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    format: Format

    @property
    def logical(self) -> kernel.Logical:
        return kernel.Logical(self.codes, self.scale, self.zero)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    def dequantize(self) -> Tensor:
        """The weights that these codes stand for, fp32 [N, K]."""
        return kernel.dequantize(self.logical, self.format.group)

    def pack(self) -> kernel.Packed:
        """As the kernels read it."""
        return kernel.pack(self.logical, self.format.group, self.format.dynamic)


def scales(w_NGk: Tensor, format: Format, importance_Gk: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Scale [N, G] and zero [N, G] of fp32 weights by group.

    With `importance` (the mean square of each input), smaller scales that clip are tried too, and each group takes the
    one with the least weighted squared error (the clipping search of AWQ, Lin et al. 2023).
    """
    best = _scales(w_NGk, format, 1.0)
    if importance_Gk is None:
        return best
    scale_NG, zero_NG = best
    least_NG = _error(w_NGk, scale_NG, zero_NG, format, importance_Gk)
    for shrink in SHRINK:
        scale, zero = _scales(w_NGk, format, shrink)
        error_NG = _error(w_NGk, scale, zero, format, importance_Gk)
        better_NG = error_NG < least_NG
        least_NG = torch.where(better_NG, error_NG, least_NG)
        scale_NG = torch.where(better_NG, scale, scale_NG)
        if zero_NG is not None and zero is not None:
            zero_NG = torch.where(better_NG, zero, zero_NG)
    return scale_NG, zero_NG


def round_to(w_NGk: Tensor, scale_NG: Tensor, zero_NG: Tensor | None, format: Format) -> Tensor:
    """The nearest codes [N, G, k] under a given scale and zero."""
    scale = scale_NG.float()[..., None]
    steps = torch.where(scale != 0, w_NGk / scale, 0.0).round_()
    steps += format.idle if zero_NG is None else zero_NG.float()[..., None]
    return steps.clamp_(format.least, format.most).to(format.code_dtype)


def _scales(w_NGk: Tensor, format: Format, shrink: float) -> tuple[Tensor, Tensor | None]:
    low_NG, high_NG = w_NGk.amin(-1).clamp_max(0), w_NGk.amax(-1).clamp_min(0)
    least, most = format.least - format.idle, format.most - format.idle
    if format.symmetric:
        upright = torch.maximum(high_NG / most, low_NG / least)
        turned = torch.maximum(-low_NG / most, high_NG / -least)
        return _up(torch.where(turned < upright, -turned, upright) * shrink, format.scale_dtype), None
    scale_NG = _up((high_NG - low_NG) / (most - least) * shrink, format.scale_dtype)
    wide = scale_NG.float()
    zero_NG = torch.where(wide != 0, format.least - low_NG / wide, float(format.idle)).round_()
    return scale_NG, zero_NG.clamp_(format.least, format.most).to(format.code_dtype)


def _up(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to `dtype`, away from zero."""
    near = scale.to(dtype)
    if dtype == torch.float32:
        return near
    short = near.float().abs() < scale.abs()
    return torch.where(short, (near.view(torch.int16) + 1).view(dtype), near)


def _error(w_NGk: Tensor, scale_NG: Tensor, zero_NG: Tensor | None, format: Format, importance_Gk: Tensor) -> Tensor:
    codes = round_to(w_NGk, scale_NG, zero_NG, format).float()
    whole = codes - (format.idle if zero_NG is None else zero_NG.float()[..., None])
    off = whole.mul_(scale_NG.float()[..., None]).sub_(w_NGk)
    return (off.square_() * importance_Gk).sum(-1)
