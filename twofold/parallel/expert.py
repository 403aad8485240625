"""Expert parallel: each rank of a group has its own experts, and tokens go to them and come back (GShard).

    rank 0: experts 0 1              rank 1: experts 2 3
    token a chose 1 and 2   ──a──▶   a's choice 2       a goes to both, with the choices that are there
    token b chose 0 and 1            (nothing of b)     b stays, once, with both of its choices
    a = its part here + its part from there             the parts are added in the order of ranks, that of experts

A token is sent at most once to a rank, however many of its experts live there, and one weighted sum comes back. Who
sends how much is exchanged first, so nothing is padded and nothing dropped.

Shapes: T tokens, D hidden size, C experts chosen for a token, S rows sent, R rows received, N ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..core import ConfigError
from .comm import exchange, exchanged


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What a rank has of a tensor whose first dimension is divided: rows `start` to `stop` of `whole`."""

    start: int
    stop: int
    whole: int

    @property
    def slice(self) -> slice:
        return slice(self.start, self.stop)


def rows_of(experts: int, ranks: int, rank: int) -> Rows:
    """The experts of one rank.

    Raises:
        ConfigError: the ranks cannot have equally many.
    """
    if experts % ranks:
        legal = ", ".join(str(n) for n in range(1, experts + 1) if experts % n == 0)
        raise ConfigError(f"{experts} experts cannot be divided among {ranks} ranks: parallel.ep may be {legal}")
    each = experts // ranks
    return Rows(start=rank * each, stop=(rank + 1) * each, whole=experts)


Compute = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x [R, D], weights [R, C], local experts [R, C], -1 for none) to each row's weighted sum [R, D]."""


def through(
    x_TD: Tensor, weights_TC: Tensor, experts_TC: Tensor, each: int, group: dist.ProcessGroup, compute: Compute
) -> Tensor:
    """Every token's weighted sum of experts, wherever they are; a negative choice is none. All ranks of the group call.

    Expert e is rank e // `each`'s, number e % `each` there. Gradients take the same ways back, so that a rank's experts
    get those of every token in the group.
    """
    owner_TC = torch.div(experts_TC, each, rounding_mode="floor")  # of -1: -1
    goes_TN = (owner_TC[:, :, None] == torch.arange(group.size(), device=x_TD.device)).any(1)
    rank_S, token_S = goes_TN.t().nonzero(as_tuple=True)  # by rank, each rank's by token
    there_SC = owner_TC[token_S] == rank_S[:, None]
    local_SC = torch.where(there_SC, experts_TC[token_S] - each * rank_S[:, None], -1)

    send_N = goes_TN.sum(0)
    receive_N = exchanged(send_N, group, [1] * group.size(), [1] * group.size())
    send, receive = send_N.tolist(), receive_N.tolist()
    x_RD = exchange(x_TD[token_S], group, send, receive)
    weights_RC = exchange(weights_TC[token_S], group, send, receive)
    local_RC = exchanged(local_SC, group, send, receive)
    y_RD = compute(x_RD, weights_RC, local_RC)
    if torch.is_grad_enabled():
        y_RD = _Bound.apply(y_RD, x_RD, weights_RC)
    return _added(exchange(y_RD, group, receive, send), token_S, goes_TN, experts_TC.shape[1])


def _added(y_SD: Tensor, token_S: Tensor, goes_TN: Tensor, most: int) -> Tensor:
    """The parts of each token, added in the order of the ranks that they came from."""
    nothing = len(y_SD)  # a row of zeros behind the others
    y_SD = torch.cat((y_SD, y_SD.new_zeros(1, y_SD.shape[1])))
    rank_S = goes_TN.t().nonzero(as_tuple=True)[0]
    turn_S = (goes_TN.cumsum(1) - 1)[token_S, rank_S]
    place_TK = token_S.new_full((len(goes_TN), min(most, goes_TN.shape[1])), nothing)
    place_TK[token_S, turn_S] = torch.arange(nothing, device=token_S.device)
    out_TD = y_SD[place_TK[:, 0]]
    for turn in range(1, place_TK.shape[1]):
        out_TD = out_TD + y_SD[place_TK[:, turn]]
    return out_TD


class _Bound(torch.autograd.Function):
    """y as it is. A rank that no token came to has no gradient of its own, yet its backward must join the exchanges."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, weights)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weights = ctx.saved_tensors
        return grads[0], torch.zeros_like(x), torch.zeros_like(weights)
