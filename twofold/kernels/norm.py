"""Root-mean-square and layer normalisation over the last dimension, in fp32 whatever comes in.

Shapes: [..., D], weights [D] or broadcastable to [..., D] ([H, D] for heads that have their own).
"""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native, stages
from .backward import normed
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


@rms_norm.on("native", why="one pass a row, sixteen sums in one fixed tree", missing=native.missing, bits="own")
def _rms(x: Tensor, w: Tensor | None, eps: float, offset: bool = False) -> Tensor:
    if not _fits(x, w):
        return rms_norm.reference(x, w, eps, offset)
    return normed(lambda: _rms_forward(x, w, eps, offset), x, w, None, eps, kind="rms", offset=offset)


@layer_norm.on("native", why="one pass a row, sixteen sums in one fixed tree", missing=native.missing, bits="own")
def _layer(x: Tensor, w: Tensor | None, b: Tensor | None, eps: float) -> Tensor:
    if not _fits(x, w):
        return layer_norm.reference(x, w, b, eps)
    return normed(lambda: _layer_forward(x, w, b, eps), x, w, b, eps, kind="layer", offset=False)


def _rms_forward(x: Tensor, w: Tensor | None, eps: float, offset: bool) -> Tensor:
    return _normalise(x, w, None, eps, kind="rms", offset=offset)


def _layer_forward(x: Tensor, w: Tensor | None, b: Tensor | None, eps: float) -> Tensor:
    return _normalise(x, w, b, eps, kind="layer")


def _fits(x: Tensor, w: Tensor | None) -> bool:
    known = w is None or w.dtype in (torch.float32, torch.bfloat16)
    return x.dtype == torch.float32 and x.device.type == "cpu" and known and x.dim() > 0


def _normalise(x: Tensor, w: Tensor | None, b: Tensor | None, eps: float, *, kind: str, offset: bool = False) -> Tensor:
    library = native.library()
    assert library is not None, "asked for only where it is there"
    x = x.contiguous()
    out = torch.empty_like(x)
    width = x.shape[-1]
    groups = w.shape[0] if w is not None and w.dim() == 2 else 1
    rows = ctypes.c_int32(x.numel() // max(1, width * groups))
    w, b = (None if part is None else part.contiguous() for part in (w, b))
    stage = stage_of(
        w, b, eps, ctypes.addressof(rows), kind=kind, groups=groups, width=width, offset=offset, x=x, out=out, stride=0
    )
    library.run(stages.program(stage), torch.get_num_threads())
    return out


def stage_of(
    w: Tensor | None,
    b: Tensor | None,
    eps: float,
    rows: int,
    *,
    kind: str,
    groups: int,
    width: int,
    offset: bool,
    x: Tensor,
    out: Tensor,
    y: Tensor | None = None,
    scale: float = 1.0,
    stride: int | None = None,
) -> stages.Norm:
    """The stage of a norm over `groups` runs of `width` in each row, first adding scale · y to x where y is given.

    `rows` is the address of the row count; `stride` 0 means rows of x and out without gaps, None their own strides.
    """
    whole = groups * width
    return stages.Norm(
        rows=rows,
        groups=groups,
        width=width,
        kind=("rms", "layer").index(kind),
        offset=offset,
        per_group=w is not None and w.dim() == 2,
        eps=eps,
        scale=scale,
        weight=stages.numbers(w),
        bias=stages.numbers(b),
        x=x.data_ptr(),
        x_stride=whole if stride == 0 else x.stride(0),
        y=None if y is None else y.data_ptr(),
        y_stride=0 if y is None else y.stride(0),
        out=out.data_ptr(),
        out_stride=whole if stride == 0 else out.stride(0),
    )
