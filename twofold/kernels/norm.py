"""Root-mean-square and layer normalisation over the last dimension, in fp32 whatever comes in.

Shapes: [..., D], weights [D] or broadcastable to [..., D].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .op import op


@op
def rms_norm(x: Tensor, w: Tensor | None, eps: float, offset: bool = False) -> Tensor:
    """x / sqrt(mean x² + eps) · w (Zhang and Sennrich 2019); `offset` multiplies by 1 + w, before rounding (Gemma)."""
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    if w is None:
        return y.to(x.dtype)
    if offset:
        return (y * (1.0 + w.float())).to(x.dtype)
    return y.to(x.dtype) * w


@op
def layer_norm(x: Tensor, w: Tensor | None, b: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) · w + b (Ba et al. 2016)."""
    y = F.layer_norm(x.float(), (x.shape[-1],), None, None, eps)
    if w is not None:
        y = y * w.float()
    if b is not None:
        y = y + b.float()
    return y.to(x.dtype)
