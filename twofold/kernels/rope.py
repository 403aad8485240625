"""Rotary positions (Su et al. 2021): turn pairs of a head's numbers by an angle that grows with the position.

Shapes: T tokens, H heads, D head size, R pairs turned (2R <= D).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import native, stages
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


@rotate.on("native", why="one pass over each head; the gradient is the same turn the other way", missing=native.missing)
def _native(x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor, interleaved: bool = False) -> Tensor:
    if x_THD.dtype != torch.float32 or x_THD.device.type != "cpu" or cos_TR.dtype != torch.float32:
        return _rotate(x_THD, cos_TR, sin_TR, interleaved)
    return _with_gradient(_turn, x_THD, cos_TR, sin_TR, interleaved)


def _turn(x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor, interleaved: bool = False) -> Tensor:
    """The reference's bits by the kernel that the compiled decoder turns queries and keys with."""
    library = native.library()
    assert library is not None, "asked for only where it is there"
    T, H, D = x_THD.shape
    out_THD = x_THD.clone(memory_format=torch.contiguous_format)
    cos_TR, sin_TR, rows_T = cos_TR.contiguous(), sin_TR.contiguous(), torch.arange(T, dtype=torch.int32)
    step = stages.Step(tokens=T, positions=rows_T.data_ptr())
    heads = stages.Heads(
        cache=stages.Cache(dim=D),
        qkv=out_THD.data_ptr(),
        qkv_stride=H * D,
        heads=H,
        pairs=cos_TR.shape[-1],
        interleaved=interleaved,
        cos=cos_TR.data_ptr(),
        sin=sin_TR.data_ptr(),
    )
    heads.step = ctypes.pointer(step)
    library.run(stages.program(heads), torch.get_num_threads())
    return out_THD


@rotate.on("rotation", why="the same forward; the gradient is the same turn the other way")
def _rotate(x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor, interleaved: bool = False) -> Tensor:
    return _with_gradient(rotate.reference, x_THD, cos_TR, sin_TR, interleaved)


Turn = Callable[[Tensor, Tensor, Tensor, bool], Tensor]


def _with_gradient(turn: Turn, x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor, interleaved: bool) -> Tensor:
    if torch.is_grad_enabled() and x_THD.requires_grad:
        out: Tensor = _Rotate.apply(x_THD, cos_TR, sin_TR, interleaved, turn)
        return out
    return turn(x_THD, cos_TR, sin_TR, interleaved)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor, interleaved: bool, turn: Turn) -> Tensor:
        ctx.save_for_backward(cos_TR, sin_TR)
        ctx.interleaved, ctx.turn = interleaved, turn
        return turn(x_THD, cos_TR, sin_TR, interleaved)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (grad_THD,) = grads
        cos_TR, sin_TR = ctx.saved_tensors
        return ctx.turn(grad_THD, cos_TR, -sin_TR, ctx.interleaved), None, None, None, None
