"""Rotary positions (Su et al. 2021): turn pairs of a head's numbers by an angle that grows with the position.

Shapes: T tokens, H heads, D head size, R pairs turned (2R <= D).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .op import op


@op
def rotate(x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor, interleaved: bool = False) -> Tensor:
    """Turn the first 2R numbers of each head: neighbours (0,1), (2,3) when `interleaved`, else the halves (i, i+R)."""
    pairs = cos_TR.shape[-1]
    turned = x_THD[..., : 2 * pairs].float()
    cos, sin = cos_TR[:, None, :], sin_TR[:, None, :]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        out = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = turned[..., :pairs], turned[..., pairs:]
        out = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    out = out.to(x_THD.dtype)
    if 2 * pairs == x_THD.shape[-1]:
        return out
    return torch.cat((out, x_THD[..., 2 * pairs :]), -1)


@rotate.on("rotation", why="the same forward; the gradient is the same turn the other way")
def _rotate(x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor, interleaved: bool = False) -> Tensor:
    if torch.is_grad_enabled() and x_THD.requires_grad:
        out: Tensor = _Rotate.apply(x_THD, cos_TR, sin_TR, interleaved)
        return out
    return rotate.reference(x_THD, cos_TR, sin_TR, interleaved)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos_TR, sin_TR)
        ctx.interleaved = interleaved
        return rotate.reference(x_THD, cos_TR, sin_TR, interleaved)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad_THD,) = grads
        cos_TR, sin_TR = ctx.saved_tensors
        return rotate.reference(grad_THD, cos_TR, -sin_TR, ctx.interleaved), None, None, None
