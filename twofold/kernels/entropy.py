"""Entropy of what may come next, straight from hidden states: the logits of a whole batch are never held.

    H = log Z - Σ p·x      x the logits, p = softmax(x), Z their sum of exponentials
    dH/dx = -p·(log p + H)

Some rows at a time become logits, and a number each; backward makes their logits again. What is added up over the
vocabulary is added in pairs, then pairs of pairs, so that a row's bits are its own, whatever rows are beside it.

Shapes: R rows, D hidden size, V vocabulary, N numbers of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .activation import soft_cap
from .linear import linear
from .op import op, unwatched
from .slopes import input_slopes, weight_slopes

NUMBERS, ROWS = 1 << 22, 16
"""Logits that are held at once, about (16 MiB), yet never of fewer rows than make their product worth it."""


@op
def token_entropy(
    hidden_RD: Tensor, w_VD: Tensor, b_V: Tensor | None, multiplier: float = 1.0, softcap: float | None = None
) -> Tensor:
    """Entropy [R] in nats of each row, whose scores are capped(multiplier · (w · hidden + b))."""
    return entropy_of(_logits(hidden_RD, w_VD, b_V, multiplier, softcap))


def _logits(hidden_RD: Tensor, w_VD: Tensor, b_V: Tensor | None, multiplier: float, softcap: float | None) -> Tensor:
    logits_RV = linear(hidden_RD, w_VD, b_V).float()
    if multiplier != 1.0:
        logits_RV = logits_RV * multiplier
    return logits_RV if softcap is None else soft_cap(logits_RV, softcap)


@op
def entropy_of(logits_RV: Tensor) -> Tensor:
    """Entropy [R] in nats of each row of fp32 logits."""
    return -summed(torch.softmax(logits_RV, -1) * torch.log_softmax(logits_RV, -1))


def summed(x_RN: Tensor) -> Tensor:
    """The sum [R] of each row, one half added to the other until one number is left."""
    while (width := x_RN.shape[1]) > 1:
        half = (width + 1) // 2
        x_RN = x_RN[:, :half] + F.pad(x_RN[:, half:], (0, 2 * half - width))
    return x_RN[:, 0]


@token_entropy.on("rows", why="some rows at a time, whose logits are made again for the gradient: no others are held")
def _rows(
    hidden_RD: Tensor, w_VD: Tensor, b_V: Tensor | None, multiplier: float = 1.0, softcap: float | None = None
) -> Tensor:
    out: Tensor = _ByRows.apply(hidden_RD, w_VD, b_V, multiplier, softcap)
    return out


class _ByRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_RD: Tensor, w_VD: Tensor, b_V: Tensor | None, multiplier: float, softcap: float | None
    ) -> Tensor:
        ctx.save_for_backward(hidden_RD, w_VD, b_V)
        ctx.shape = multiplier, softcap
        out_R = hidden_RD.new_empty(len(hidden_RD), dtype=torch.float32)
        for at in _chunks(len(hidden_RD), w_VD.shape[0]):
            out_R[at] = token_entropy.reference(hidden_RD[at], w_VD, b_V, multiplier, softcap)
        return out_R

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_RD, w_VD, b_V = ctx.saved_tensors
        needs = ctx.needs_input_grad
        d_hidden_RD = torch.zeros_like(hidden_RD) if needs[0] else None
        d_w_VD = torch.zeros_like(w_VD, dtype=torch.float32) if needs[1] else None
        d_b_V = torch.zeros_like(b_V, dtype=torch.float32) if needs[2] else None
        for at in _chunks(len(hidden_RD), w_VD.shape[0]):
            with unwatched():
                d_CV = _slopes(_logits(hidden_RD[at], w_VD, b_V, *ctx.shape), grads[0][at], *ctx.shape)
            if d_hidden_RD is not None:
                d_hidden_RD[at] = input_slopes(d_CV, w_VD)
            if d_w_VD is not None:
                weight_slopes(d_CV, hidden_RD[at].float(), d_w_VD, add=True)
            if d_b_V is not None:
                d_b_V += d_CV.sum(0)
        return (
            d_hidden_RD,
            None if d_w_VD is None else d_w_VD.to(w_VD.dtype),
            None if d_b_V is None else d_b_V.to(b_V.dtype),
            None,
            None,
        )


def _slopes(logits_RV: Tensor, upstream_R: Tensor, multiplier: float, softcap: float | None) -> Tensor:
    """The gradient [R, V] of the scores before they were multiplied and capped."""
    log_RV = torch.log_softmax(logits_RV, -1)
    out_RV = log_RV.exp()
    entropy_R = -summed(out_RV * log_RV)
    out_RV *= -multiplier * upstream_R[:, None]
    out_RV *= log_RV.add_(entropy_R[:, None])
    return out_RV if softcap is None else out_RV.mul_(1 - (logits_RV / softcap).square())


def _chunks(rows: int, vocab: int) -> Iterator[slice]:
    """Rows of which so few are logits at once."""
    size = max(ROWS, NUMBERS // max(1, vocab))
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))
