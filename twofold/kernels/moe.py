"""Mixture of experts: each token goes through its own few feed-forwards, added in expert order.

Shapes: T tokens, D hidden, E experts, F expert width, C experts chosen for a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .activation import gated
from .linear import linear
from .op import op


@op
def route(logits_TE: Tensor, top_k: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    """Softmax over all experts, the `top_k` best and their weights: (weights [T, C] fp32, experts [T, C])."""
    weights_TE = torch.softmax(logits_TE.float(), -1)
    weights_TC, experts_TC = torch.topk(weights_TE, top_k, -1)
    if renormalise:
        weights_TC = weights_TC / weights_TC.sum(-1, keepdim=True)
    return weights_TC, experts_TC


@op
def experts(
    x_TD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, weights_TC: Tensor, experts_TC: Tensor, act: str
) -> Tensor:
    """The weighted sum of each token's experts; no token is dropped, and the order of addition is the experts'."""
    out_TD = torch.zeros_like(x_TD)
    for expert in experts_TC.unique().tolist():
        token, choice = torch.where(experts_TC == expert)
        hidden = gated(linear(x_TD[token], gate_up_E2FD[expert]), act)
        share = linear(hidden, down_EDF[expert]) * weights_TC[token, choice, None].to(x_TD.dtype)
        out_TD = out_TD.index_add(0, token, share)
    return out_TD
