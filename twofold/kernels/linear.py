"""Linear layers whose rows have one bit pattern, in training and in serving.

Shapes: T tokens, K inputs, N outputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .op import op
from .rows import by_rows, by_tiles

WIDTH = 16


@op
def linear(x_TK: Tensor, w_NK: Tensor, b_N: Tensor | None = None) -> Tensor:
    """x Wᵀ + b, a tile of rows at a time: the definition that every other way must match bit for bit."""
    if x_TK.shape[0] == 0:
        return x_TK.new_empty(0, w_NK.shape[0])
    y_TN = by_tiles(x_TK, _wide(w_NK).t())[:, : w_NK.shape[0]]
    return y_TN if b_N is None else y_TN + b_N


def _wide(w_NK: Tensor) -> Tensor:
    """At least WIDTH outputs: for fewer a library may take a path whose bits depend on the row's place."""
    return w_NK if w_NK.shape[0] >= WIDTH else F.pad(w_NK, (0, 0, 0, WIDTH - w_NK.shape[0]))


@linear.on("rows", why="as many rows at a time as this machine was measured to give the definition's bits for")
def _rows(x_TK: Tensor, w_NK: Tensor, b_N: Tensor | None = None) -> Tensor:
    if torch.is_grad_enabled() and (x_TK.requires_grad or w_NK.requires_grad):
        out: Tensor = _Linear.apply(x_TK, w_NK, b_N)
        return out
    return _forward(x_TK, w_NK, b_N)


def _forward(x_TK: Tensor, w_NK: Tensor, b_N: Tensor | None) -> Tensor:
    if x_TK.shape[0] == 0:
        return x_TK.new_empty(0, w_NK.shape[0])
    y_TN = by_rows(x_TK.contiguous(), _wide(w_NK).t())[:, : w_NK.shape[0]]
    return y_TN if b_N is None else y_TN.add_(b_N)


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
