"""Ring attention: keys and values travel round the ranks while each looks at those that are with it.

    step 0   rank r has its own keys       while it looks, they are on their way to r + 1
    step j   rank r has those of r - j     results fold as in online softmax

Backward goes round once more: scores are made again, and the gradients of keys and values travel with them, until they
are home after N hops (Liu et al. 2023). What a rank may not see at all is skipped.

Shapes: L tokens of a rank, H query heads = K key-value heads x G, D head size; M rows of queries, N of keys in a tile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ..core.errors import ConfigError
from ..kernels.attention import Attend

TILE = 512
"""Queries and keys of a tile: its scores, H x 512 x 512, are all that is held of them."""
_NOTHING = -1e30


class Places(NamedTuple):
    """Which sequence each of a rank's tokens belongs to, and where it stands in it: int64 [L] each."""

    owner_L: Tensor
    position_L: Tensor


def ring_attention(
    q_LHD: Tensor, k_LKD: Tensor, v_LKD: Tensor, places: Sequence[Places], how: Attend, group: dist.ProcessGroup
) -> Tensor:
    """Causal attention of this rank's tokens over the keys of all ranks, whose tokens stand at `places`: [L, H, D].

    Raises:
        ConfigError: attention that looks ahead.
    """
    if not how.causal:
        raise ConfigError('the ring is of causal attention: use sp_kind = "ulysses" for an encoder')
    return cast(Tensor, _Ring.apply(q_LHD, k_LKD, v_LKD, places, how, group))


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_LHD: Tensor, k_LKD: Tensor, v_LKD: Tensor, places: Any, how: Attend, group: dist.ProcessGroup
    ) -> Tensor:
        heads, kv_heads = q_LHD.shape[1], k_LKD.shape[1]
        q_KLGD = _by_head(q_LHD.float(), kv_heads)
        top = q_KLGD.new_full((*q_KLGD.shape[:3], 1), _NOTHING)
        total, mixed = torch.zeros_like(top), torch.zeros_like(q_KLGD)
        for source, both in _round(torch.stack([k_LKD, v_LKD]).float(), group):
            for rows, keys, scores in _tiles(q_KLGD, both[0], places[group.rank()], places[source], how):
                higher = torch.maximum(top[:, rows], scores.amax(-1, keepdim=True))
                old, power = torch.exp(top[:, rows] - higher), torch.exp(scores - higher)
                total[:, rows] = total[:, rows] * old + power.sum(-1, keepdim=True)
                mixed[:, rows] = mixed[:, rows] * old + torch.einsum("klgn,nkd->klgd", power, both[1, keys])
                top[:, rows] = higher
        out_KLGD = mixed / total
        ctx.save_for_backward(q_KLGD, k_LKD, v_LKD, out_KLGD, top + total.log())
        ctx.places, ctx.how, ctx.group, ctx.heads = places, how, group, heads
        return _as_rows(out_KLGD).to(q_LHD.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        q_KLGD, k_LKD, v_LKD, out_KLGD, lse = ctx.saved_tensors
        how, group, places = ctx.how, ctx.group, ctx.places
        grad_KLGD = _by_head(grads[0].float(), k_LKD.shape[1])
        own = (grad_KLGD * out_KLGD).sum(-1, keepdim=True)
        grad_q = torch.zeros_like(q_KLGD)
        # what travels: keys, values, and the gradients that ranks have added for them so far
        going = torch.stack([k_LKD, v_LKD, torch.zeros_like(k_LKD), torch.zeros_like(v_LKD)]).float()
        for source, four in _round(going, group, home=True):
            for rows, keys, scores in _tiles(q_KLGD, four[0], places[group.rank()], places[source], how):
                chance = torch.exp(scores - lse[:, rows])
                four[3, keys] += torch.einsum("klgn,klgd->nkd", chance, grad_KLGD[:, rows])
                slope = chance * (torch.einsum("klgd,nkd->klgn", grad_KLGD[:, rows], four[1, keys]) - own[:, rows])
                slope = slope * how.scale
                if how.softcap is not None:
                    raw = _raw(q_KLGD[:, rows], four[0, keys], how)
                    slope = slope * (1 - torch.tanh(raw / how.softcap) ** 2)
                grad_q[:, rows] += torch.einsum("klgn,nkd->klgd", slope, four[0, keys])
                four[2, keys] += torch.einsum("klgn,klgd->nkd", slope, q_KLGD[:, rows])
            going = four
        return _as_rows(grad_q).to(grads[0].dtype), going[2].to(k_LKD.dtype), going[3].to(v_LKD.dtype), None, None, None


def _by_head(x_LHD: Tensor, kv_heads: int) -> Tensor:
    """[L, H, D] to [K, L, G, D]."""
    L, H, D = x_LHD.shape
    return x_LHD.view(L, kv_heads, H // kv_heads, D).transpose(0, 1).contiguous()


def _as_rows(x_KLGD: Tensor) -> Tensor:
    """[K, L, G, D] to [L, H, D]."""
    return x_KLGD.transpose(0, 1).flatten(1, 2)


def _raw(q_KMGD: Tensor, k_NKD: Tensor, how: Attend) -> Tensor:
    return torch.einsum("klgd,nkd->klgn", q_KMGD, k_NKD) * how.scale


def _tiles(
    q_KLGD: Tensor, k_LKD: Tensor, mine: Places, theirs: Places, how: Attend
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Every tile in which something is seen: its queries, its keys, its scores [K, M, G, N], -inf where hidden."""
    for first in range(0, q_KLGD.shape[1], TILE):
        rows = slice(first, first + TILE)
        for start in range(0, k_LKD.shape[0], TILE):
            keys = slice(start, start + TILE)
            gap_MN = theirs.position_L[None, keys] - mine.position_L[rows, None]
            seen_MN = (gap_MN <= 0) & (theirs.owner_L[None, keys] == mine.owner_L[rows, None])
            if how.window is not None:
                seen_MN &= gap_MN > -how.window
            hidden = ~seen_MN[None, :, None, :]
            if how.sparse is not None:
                table, kv_heads = how.sparse.table(k_LKD.device), k_LKD.shape[1]
                hidden = hidden | table.absent(mine.position_L[None, rows], theirs.position_L[keys], kv_heads)[0]
            if hidden.all():
                continue
            scores = _raw(q_KLGD[:, rows], k_LKD[keys], how)
            if how.softcap is not None:
                scores = how.softcap * torch.tanh(scores / how.softcap)
            if how.slopes is not None:
                slopes_KG = torch.tensor(how.slopes).view(q_KLGD.shape[0], -1)
                scores = scores + slopes_KG[:, None, :, None] * gap_MN[None, :, None, :]
            yield rows, keys, scores.masked_fill(hidden, -torch.inf)


def _round(things: Tensor, group: dist.ProcessGroup, *, home: bool = False) -> Iterator[tuple[int, Tensor]]:
    """(whose it is, what is here) for every rank's things; with `home` what was added goes along, and comes back.

    Without it the next things are on their way while these are looked at.
    """
    ranks, rank = group.size(), group.rank()
    here = things.contiguous()
    for step in range(ranks):
        last = step == ranks - 1
        coming = None if home or last else _pass_on(here, group)
        yield (rank - step) % ranks, here
        if home:
            coming = _pass_on(here, group)
        if coming is not None:
            following, work = coming
            for it in work:
                it.wait()
            if home and last:
                here.copy_(following)
            else:
                here = following


def _pass_on(here: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Sequence[Any]]:
    """Send what is here to the next rank, and receive the last one's."""
    following, ranks, rank = torch.empty_like(here), group.size(), group.rank()
    to, source = ((rank + step) % ranks for step in (1, -1))
    work = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, here, group=group, group_peer=to),
            dist.P2POp(dist.irecv, following, group=group, group_peer=source),
        ]
    )
    return following, work
