"""Norms in one pass over memory, with the residual added on the way where there is one.

A program takes ROWS whole rows, as many as the row's width allows and never as the batch suggests, so a row's sum has
one order of additions.

Shapes: R rows of D numbers; rows may be heads of tokens [T, H, D] that lie apart in memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _norm(
    x, residual, w, b, y, total, R, D, H, token_stride, head_stride, scale, eps, W,
    SCALED: tl.constexpr, LAYER: tl.constexpr, OFFSET: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK)
    live = (row < R)[:, None] & (d < D)[None, :]
    apart = (row // H).to(tl.int64) * token_stride + (row % H) * head_stride
    dense = row.to(tl.int64)[:, None] * D + d[None, :]
    v = tl.load(x + apart[:, None] + d[None, :], live, 0.0).to(tl.float32)
    if residual is not None:
        if SCALED:
            v = (v * scale).to(x.dtype.element_ty).to(tl.float32)
        v += tl.load(residual + dense, live, 0.0).to(tl.float32)
        rounded = v.to(total.dtype.element_ty)
        tl.store(total + dense, rounded, live)
        v = rounded.to(tl.float32)
    if LAYER:
        mean = tl.sum(v, 1) / D
        v = tl.where(live, v - mean[:, None], 0.0)
    variance = tl.sum(v * v, 1) / D
    v = v * tl.rsqrt(variance + eps)[:, None]
    which = (row % W)[:, None] * D + d[None, :]
    if w is not None:
        weight = tl.load(w + which, live, 0.0).to(tl.float32)
        if LAYER:
            v = v * weight
        elif OFFSET:
            v = v * (1.0 + weight)
        else:
            v = v.to(x.dtype.element_ty).to(tl.float32) * weight
    if b is not None:
        v += tl.load(b + which, live, 0.0).to(tl.float32)
    tl.store(y + dense, v.to(y.dtype.element_ty), live)


def rms_norm(x: Tensor, w: Tensor | None, eps: float, offset: bool = False) -> Tensor:
    """`kernels.norm.rms_norm` on CUDA."""
    dtype = x.dtype if w is None or offset else torch.promote_types(x.dtype, w.dtype)
    return _run(x, None, w, None, eps, 1.0, False, offset, dtype)[0]


def layer_norm(x: Tensor, w: Tensor | None, b: Tensor | None, eps: float) -> Tensor:
    """`kernels.norm.layer_norm` on CUDA."""
    return _run(x, None, w, b, eps, 1.0, True, False, x.dtype)[0]


def add_rms_norm(
    x: Tensor, residual: Tensor, w: Tensor | None, eps: float, offset: bool = False, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The rms norm of residual + scale · x, and that sum: the bits of the three steps one after another."""
    dtype = x.dtype if w is None or offset else torch.promote_types(x.dtype, w.dtype)
    return _run(x, residual, w, None, eps, scale, False, offset, dtype)


def add_layer_norm(
    x: Tensor, residual: Tensor, w: Tensor | None, b: Tensor | None, eps: float, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The layer norm of residual + scale · x, and that sum."""
    return _run(x, residual, w, b, eps, scale, True, False, x.dtype)


def _run(
    x: Tensor,
    residual: Tensor | None,
    w: Tensor | None,
    b: Tensor | None,
    eps: float,
    scale: float,
    layer: bool,
    offset: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    D = x.shape[-1]
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    total = x if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    R = x.numel() // D if D else 0
    if not R:
        return y, total
    if x.stride(-1) != 1 or x.dim() > 3 or (x.dim() == 3 and residual is not None):
        x = x.contiguous().view(-1, D)
    heads = x.shape[1] if x.dim() == 3 else 1
    token_stride = x.stride(0) if x.dim() > 1 else D
    head_stride = x.stride(1) if x.dim() == 3 else 0
    w, b = (part if part is None else part.contiguous() for part in (w, b))
    sample = w if w is not None else b
    block = triton.next_power_of_2(D)
    rows = max(1, 2048 // block)
    _norm[(triton.cdiv(R, rows),)](
        x,
        None if residual is None else residual.contiguous(),
        w,
        b,
        y,
        None if residual is None else total,
        R,
        D,
        heads,
        token_stride,
        head_stride,
        scale,
        eps,
        1 if sample is None else sample.numel() // D,
        SCALED=scale != 1.0,
        LAYER=layer,
        OFFSET=offset,
        ROWS=rows,
        BLOCK=block,
        num_warps=min(16, max(4, block // 1024)),
        enable_fp_fusion=False,
    )
    return y, total
