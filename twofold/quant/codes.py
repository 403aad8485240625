"""Quantized: a weight as whole numbers, and how real numbers become them.

A scale is chosen first, rounded up to its own dtype so that nothing falls off the end of the codes, and then the codes.

    symmetric int8    |w| ≤ 127 s
    symmetric int4    −8 s ≤ w ≤ 7 s, and s may be negative: the longer side gets the eighth step
    with zeros        s (least − zero) ≤ w ≤ s (most − zero)
    e4m3              |w| ≤ 448 s, and codes are floats themselves

Shapes: N outputs, K inputs, G groups of k inputs; experts have one more dimension in front.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..core import CheckpointError
from ..kernels import quantized as kernel

if TYPE_CHECKING:
    from .format import Format

SHRINK = tuple(1.0 - 0.04 * step for step in range(1, 11))
"""How much smaller than lossless a scale may be, when clipping a few weights serves the others."""


@dataclass(frozen=True, slots=True)
class Quantized:
    """w = scale · (code − zero): `codes` int8, e4m3 or uint8 (0..15) [N, K], `scale` [N, G], `zero` [N, G] or None.

    A float `zero` is added instead: w = scale · code + zero. With `order` [K], groups are of the weight's inputs taken
    in this order, in which `codes` have them too.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    format: Format
    order: Tensor | None = None

    @property
    def logical(self) -> kernel.Logical:
        return kernel.Logical(self.codes, self.scale, self.zero)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    def dequantize(self) -> Tensor:
        """The weights that these codes stand for, fp32 [N, K], inputs in the weight's own order."""
        w_NK = kernel.dequantize(self.logical, self.format.group)
        return w_NK if self.order is None else w_NK[..., self.order.argsort()]

    def cast(self, format: Format) -> Quantized:
        """The same weights in another format that holds them exactly; itself where the two are one.

        Raises:
            CheckpointError: they do not fit there.
        """
        return self if self.format == format else widened(self, format)

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
    if format.offset and zero_NG is not None:
        w_NGk, zero_NG = w_NGk - zero_NG[..., None], torch.zeros_like(zero_NG)
    steps = torch.where(scale != 0, w_NGk / scale, 0.0)
    if format.numbers == "fp8":
        return steps.clamp_(format.least, format.most).to(format.code_dtype)
    steps = steps.round_()
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
    if format.offset:
        return scale_NG, low_NG - wide * format.least
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
    if format.offset and zero_NG is not None:
        whole = codes + zero_NG[..., None] / scale_NG.float()[..., None]
    off = whole.mul_(scale_NG.float()[..., None]).sub_(w_NGk)
    return (off.square_() * importance_Gk).sum(-1)


def widened(quantized: Quantized, format: Format) -> Quantized:
    """A weight in a wider format: finer groups, codes of 8 bits, offsets where there were none, wider scales.

    Raises:
        CheckpointError: the format is not wider.
    """
    its, codes, scale, zero = quantized.format, quantized.codes, quantized.scale, quantized.zero
    times = (its.group or codes.shape[-1]) // format.group if format.group and its.group != format.group else 1
    narrower = its.numbers != format.numbers or its.offset > format.offset or its.bits > format.bits
    if narrower or (its.group and its.group % (format.group or codes.shape[-1])) or its.ordered != format.ordered:
        raise CheckpointError(f"weights of {its.name} do not fit into {format.name}")
    if its.bits < format.bits:
        codes = codes.to(torch.int8) - (0 if its.offset else its.idle)
        zero = zero if zero is None or its.offset else zero.to(torch.int8) - its.idle
    groups = format.groups(codes.shape[-1])
    scale = scale.repeat_interleave(times, -1)[..., :groups]
    zero = None if zero is None else zero.repeat_interleave(times, -1)[..., :groups]
    if format.offset and not its.offset:
        if zero is not None or format.bits == 4:
            raise CheckpointError(f"weights of {its.name} do not fit into {format.name}")
        zero = torch.full_like(
            scale, -0.0, dtype=torch.float32
        )  # adding this changes no number, not even a zero's sign
    return Quantized(codes.contiguous(), scale.to(format.scale_dtype), zero, format, quantized.order)
