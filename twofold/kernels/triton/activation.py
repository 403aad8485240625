"""Activations and the gated product, computed in fp32 and rounded once.

Shapes: T tokens, F feed-forward width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDTH = 1024


@triton.jit
def tanh(z):
    """From exp of what is never positive, so that it neither overflows nor loses the sign of small numbers."""
    small = tl.exp(-2.0 * tl.abs(z))
    y = (1.0 - small) / (1.0 + small)
    return tl.where(z < 0, -y, y)


@triton.jit
def activation(v, ACT: tl.constexpr):
    """One of `kernels.activation.ACTIVATIONS` of fp32 numbers."""
    if ACT == "silu":
        v = v / (1.0 + tl.exp(-v))
    elif ACT == "gelu":
        v = 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        v = 0.5 * v * (1.0 + tanh(0.7978845608028654 * (v + 0.044715 * (v * v * v))))
    elif ACT == "gelu_quick":
        v = v / (1.0 + tl.exp(-1.702 * v))
    elif ACT == "relu":
        v = tl.maximum(v, 0.0)
    else:
        tl.static_assert(ACT == "relu2", "an activation of kernels.activation.ACTIVATIONS")
        v = tl.maximum(v, 0.0)
        v = v * v
    return v


@triton.jit
def _activate(x, y, x_stride, F, ACT: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = f < F
    v = activation(tl.load(x + row * x_stride + f, live, 0.0).to(tl.float32), ACT)
    if GATED:
        v = v * tl.load(x + row * x_stride + F + f, live, 0.0).to(tl.float32)
    tl.store(y + row * F + f, v.to(y.dtype.element_ty), live)


def activate(x: Tensor, act: str) -> Tensor:
    """`kernels.activation.activate` on CUDA."""
    return _run(x, act, x.shape[-1], gated=False)


def gated(gate_up_TF: Tensor, act: str) -> Tensor:
    """`kernels.activation.gated` on CUDA: act(gate) · up."""
    return _run(gate_up_TF, act, gate_up_TF.shape[-1] // 2, gated=True)


def _run(x: Tensor, act: str, width: int, *, gated: bool) -> Tensor:
    y = torch.empty(*x.shape[:-1], width, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    flat = x.contiguous().view(-1, x.shape[-1]) if x.dim() != 2 or x.stride(-1) != 1 else x
    grid = (flat.shape[0], triton.cdiv(width, WIDTH))
    _activate[grid](flat, y, flat.stride(0), width, ACT=act, GATED=gated, BLOCK=WIDTH, num_warps=4)
    return y
