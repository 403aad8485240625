"""Linear layers whose rows have one bit pattern, in training and in serving.

Shapes: T tokens, K inputs, N outputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .op import op
from .rows import TILE, by_rows


@op
def linear(x_TK: Tensor, w_NK: Tensor, b_N: Tensor | None = None) -> Tensor:
    """x Wᵀ + b in tiles of TILE rows: the definition that every other way must match bit for bit."""
    pieces = x_TK.split(TILE) if x_TK.shape[0] else (x_TK,)
    padded = [F.pad(piece, (0, 0, 0, TILE - piece.shape[0])) for piece in pieces]
    return torch.cat([F.linear(piece, w_NK, b_N) for piece in padded])[: x_TK.shape[0]]


@linear.on("rows", why="as many rows at a time as this machine was measured to give the definition's bits for")
def _rows(x_TK: Tensor, w_NK: Tensor, b_N: Tensor | None = None) -> Tensor:
    if torch.is_grad_enabled() and (x_TK.requires_grad or w_NK.requires_grad):
        out: Tensor = _Linear.apply(x_TK, w_NK, b_N)
        return out
    return _forward(x_TK, w_NK, b_N)


def _forward(x_TK: Tensor, w_NK: Tensor, b_N: Tensor | None) -> Tensor:
    if x_TK.shape[0] == 0:
        return x_TK.new_empty(0, w_NK.shape[0])
    key = ("linear", *w_NK.shape, b_N is not None)
    return by_rows(lambda rows: F.linear(rows, w_NK, b_N), x_TK.contiguous(), key)


class _Linear(torch.autograd.Function):
    """The same forward with the usual gradients; backward is free of the contract but not of determinism."""

    @staticmethod
    def forward(ctx: Any, x_TK: Tensor, w_NK: Tensor, b_N: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_TK, w_NK)
        ctx.bias = b_N is not None
        return _forward(x_TK, w_NK, b_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (grad_TN,) = grads
        x_TK, w_NK = ctx.saved_tensors
        needs = ctx.needs_input_grad
        grad_x = grad_TN @ w_NK if needs[0] else None
        grad_w = grad_TN.t() @ x_TK if needs[1] else None
        grad_b = grad_TN.sum(0) if ctx.bias and needs[2] else None
        return grad_x, grad_w, grad_b
