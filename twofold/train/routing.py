"""The rules by which a mixture's tokens are dealt to experts while it trains, each a pure function.

    noise      uniform, jitter, gumbel      a function of (seed, step, layer, the token's place in the step's batch)
    capacity   capacity_of, within          which (token, choice) pairs an expert has room for
    balance    counts_of, balance_loss, z_loss, moved
    carry      a loss joins the backward pass where the logits pass, and the trainer's loss does not know

Shapes: T tokens, E experts, C experts chosen for a token, D hidden size, P pairs (T x C).
"""

from __future__ import annotations

import math
from hashlib import blake2b
from typing import Any, Literal

import torch
from torch import Tensor


# ----------------------------------------------------------------------------------------------------- noise
def key_of(*parts: int | str) -> int:
    """A 63-bit key for a stream of random numbers."""
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


def uniform(key: int, places_T: Tensor, columns: int) -> Tensor:
    """Numbers in (0, 1), fp32 [T, columns]; a row is a function of the key and of its place (int64) alone.

    A counter hashed twice by the finalizer of MurmurHash3, as SplitMix64 does (Steele et al. 2014): no stream to keep,
    so neither micro-batches nor ranks nor a resumed run change a token's numbers.
    """
    column_K = torch.arange(1, columns + 1, device=places_T.device)
    x_TK = _mixed(_mixed(places_T ^ key)[:, None] + column_K * -0x61C8864680B583EB)
    return ((x_TK >> 40 & 0xFFFFFF).float() + 0.5) * 2.0**-24


def _mixed(x: Tensor) -> Tensor:
    """int64 to int64, every bit of the result hanging on every bit of x; products wrap around."""
    x = (x ^ (x >> 33 & 0x7FFFFFFF)) * -0xAE502812AA7333
    x = (x ^ (x >> 33 & 0x7FFFFFFF)) * -0x3B314601E57A13AD
    return x ^ (x >> 33 & 0x7FFFFFFF)


def jitter(x_TD: Tensor, key: int, places_T: Tensor, width: float) -> Tensor:
    """x times numbers drawn evenly from 1 ± `width` (Switch Transformer)."""
    u_TD = uniform(key, places_T, x_TD.shape[1])
    return x_TD * (1.0 + width * (2.0 * u_TD - 1.0)).to(x_TD.dtype)


def gumbel(logits_TE: Tensor, key: int, places_T: Tensor) -> Tensor:
    """Logits with Gumbel noise: their k largest are k experts drawn by their probabilities without replacement."""
    return logits_TE.float() - uniform(key, places_T, logits_TE.shape[1]).log().neg().log()


# ----------------------------------------------------------------------------------------------------- capacity
def capacity_of(pairs: int, experts: int, factor: float, least: int) -> int:
    """The most pairs that an expert takes, of `pairs` for all `experts`."""
    return max(least, math.ceil(factor * pairs / experts))


def within(
    weights_TC: Tensor, experts_TC: Tensor, experts: int, capacity: int, by: Literal["probs", "position"]
) -> Tensor:
    """Which pairs their experts have room for, [T, C] of bool; a negative choice has none.

    An expert's pairs queue by weight, the largest first, or by their tokens' places; of equal weights the earlier token
    is before. "probs" lets a token's place hang on later tokens, which no served model could know: a bias of training.
    """
    flat_P = experts_TC.reshape(-1)
    flat_P = torch.where(flat_P < 0, experts, flat_P)
    queue_P = torch.arange(len(flat_P), device=flat_P.device)
    if by == "probs":
        queue_P = torch.argsort(weights_TC.detach().reshape(-1), descending=True, stable=True)
    queue_P = queue_P[torch.argsort(flat_P[queue_P], stable=True)]  # by expert, each expert's pairs in their queue
    counts_E = counts_of(flat_P, experts + 1)
    starts_P = (counts_E.cumsum(0) - counts_E)[flat_P[queue_P]]
    fits_P = torch.empty_like(flat_P, dtype=torch.bool)
    fits_P[queue_P] = torch.arange(len(flat_P), device=flat_P.device) - starts_P < capacity
    return fits_P.view_as(experts_TC) & (experts_TC >= 0)


# ----------------------------------------------------------------------------------------------------- balance
def counts_of(experts_TC: Tensor, experts: int) -> Tensor:
    """How many pairs chose each expert, int64 [E], without waiting for the device; a negative choice is none."""
    flat_P = experts_TC.reshape(-1)
    return flat_P.new_zeros(experts).scatter_add_(0, flat_P.clamp(min=0), (flat_P >= 0).long())


def balance_loss(logits_TE: Tensor, counts_E: Tensor) -> Tensor:
    """E · Σ_e f_e · p_e of each token [T]: f the share of `counts`, p the token's probabilities.

    Counts have no gradient; the loss pulls probability away from the experts with many (Fedus et al. 2021).
    """
    f_E = counts_E / counts_E.sum().clamp(min=1)
    return len(f_E) * (torch.softmax(logits_TE, -1) * f_E.to(logits_TE.dtype)).sum(-1)


def z_loss(logits_TE: Tensor) -> Tensor:
    """log²(Σ exp(logits)) of each token [T] (Zoph et al. 2022)."""
    return torch.logsumexp(logits_TE, -1).square()


def moved(bias_E: Tensor, counts_E: Tensor, rate: float) -> Tensor:
    """Biases after a step: those of experts below the mean load go up by `rate`, those above it down."""
    counts_E = counts_E.double()
    return bias_E + rate * torch.sign(counts_E.mean() - counts_E).to(bias_E.dtype)


# ----------------------------------------------------------------------------------------------------- carry
def carry(x: Tensor, loss: Tensor, scale: float = 1.0) -> Tensor:
    """x unchanged; where a gradient comes back through it, `scale` times the gradient of `loss` goes back beside it.

    The loss so joins any backward pass that reaches x (MoEAuxLossAutoScaler of Megatron-Core). `scale` is the loss
    scaler's, for what passes through x is scaled by it already.
    """
    out: Tensor = _Carry.apply(x, loss, scale)
    return out


class _Carry(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale, ctx.like = scale, (loss.shape, loss.dtype, loss.device)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        shape, dtype, device = ctx.like
        return grads[0], torch.full(shape, ctx.scale, dtype=dtype, device=device), None
