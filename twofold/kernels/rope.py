"""Rotary positions (Su et al. 2021): turn pairs of a head's numbers by an angle that grows with the position.

Shapes: T tokens, H heads, D head size, R pairs turned (2R <= D).
"""

from __future__ import annotations

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
