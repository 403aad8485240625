"""Entropy of what may come next, straight from hidden states: the logits of a whole batch are never held.

    H = log Z - E      x the logits, p = softmax(x), Z the sum of their exponentials, E = Σ p·x
    dH/dx = -p·(x - E)

Some rows at a time become logits, and a number each; backward makes their logits again. What is added up over the
vocabulary is added in pairs, then pairs of pairs, so that a row's bits are its own, whatever rows are beside it.

Shapes: R rows, C some of them, D hidden size, V vocabulary, N numbers of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .activation import scaled
from .linear import linear
from .loss import tempered
from .op import op, unwatched
from .slopes import input_slopes, weight_slopes

NUMBERS, ROWS = 1 << 22, 16
"""Logits that are held at once, about (16 MiB), yet never of fewer rows than make their product worth it."""


@op
def token_entropy(
    hidden_RD: Tensor,
    w_VD: Tensor,
    b_V: Tensor | None,
    multiplier: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Entropy [R] in nats of each row, whose scores are capped(multiplier · (w · hidden + b)) / temperature."""
    return entropy_of(Scores(w_VD, b_V, multiplier, softcap, temperature).of(hidden_RD))


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
    hidden_RD: Tensor,
    w_VD: Tensor,
    b_V: Tensor | None,
    multiplier: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    out: Tensor = _ByRows.apply(hidden_RD, w_VD, b_V, multiplier, softcap, temperature)
    return out


class _ByRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_RD: Tensor, w_VD: Tensor, b_V: Tensor | None, *shape: Any) -> Tensor:
        scores = Scores(w_VD, b_V, *shape)
        out_R = hidden_RD.new_empty(len(hidden_RD), dtype=torch.float32)
        for at in chunks(len(hidden_RD), len(w_VD)):
            out_R[at] = entropy_of(scores.of(hidden_RD[at]))
        ctx.save_for_backward(hidden_RD, w_VD, b_V, out_R)
        ctx.shape = shape
        return out_R

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_RD, w_VD, b_V, entropy_R = ctx.saved_tensors

        def turn(logits_CV: Tensor, at: slice) -> Tensor:
            log_C = torch.logsumexp(logits_CV, 1)
            return slopes_of(logits_CV, log_C, log_C - entropy_R[at], grads[0][at])

        found = Scores(w_VD, b_V, *ctx.shape).slopes(hidden_RD, ctx.needs_input_grad, turn)
        return (*found, None, None, None)


@dataclass(frozen=True, slots=True)
class Scores:
    """A head, whose logits are capped(multiplier · (w · hidden + b)) / temperature."""

    w_VD: Tensor
    b_V: Tensor | None
    multiplier: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def of(self, hidden_CD: Tensor) -> Tensor:
        """Logits [C, V], fp32."""
        scores_CV = linear(hidden_CD, self.w_VD, self.b_V).float()
        return tempered(scaled(scores_CV, self.multiplier, self.softcap), self.temperature)

    def slopes(
        self, hidden_RD: Tensor, needs: Sequence[bool], turn: Callable[[Tensor, slice], Tensor]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of hidden states, weight and bias, those of them that are needed.

        `turn` gives the gradient of some rows' logits [C, V], and leaves those as they are.
        """
        wide = [
            None if x is None else torch.zeros_like(x, dtype=torch.float32) for x in (hidden_RD, self.w_VD, self.b_V)
        ]
        d_hidden_RD, d_w_VD, d_b_V = (x if need else None for x, need in zip(wide, needs, strict=False))
        for at in chunks(len(hidden_RD), len(self.w_VD)):
            with unwatched():
                logits_CV = self.of(hidden_RD[at])
            d_CV = turn(logits_CV, at)
            if self.softcap is not None:
                d_CV *= 1 - (logits_CV * (self.temperature / self.softcap)).square()
            d_CV *= self.multiplier / self.temperature
            if d_hidden_RD is not None:
                d_hidden_RD[at] = input_slopes(d_CV, self.w_VD)
            if d_w_VD is not None:
                weight_slopes(d_CV, hidden_RD[at].float(), d_w_VD, add=True)
            if d_b_V is not None:
                d_b_V += d_CV.sum(0)
        pairs = zip((d_hidden_RD, d_w_VD, d_b_V), (hidden_RD, self.w_VD, self.b_V), strict=True)
        found = [None if d is None or x is None else d.to(x.dtype) for d, x in pairs]
        return found[0], found[1], found[2]


def chunks(rows: int, vocab: int) -> Iterator[slice]:
    """So many rows at a time as are logits at once."""
    size = max(ROWS, NUMBERS // max(1, vocab))
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def slopes_of(logits_RV: Tensor, log_R: Tensor, mean_R: Tensor, upstream_R: Tensor) -> Tensor:
    """The gradient [R, V] of logits whose log Z and E are known."""
    out_RV = (logits_RV - log_R[:, None]).exp_()
    out_RV *= mean_R[:, None] - logits_RV
    return out_RV.mul_(upstream_R[:, None])
