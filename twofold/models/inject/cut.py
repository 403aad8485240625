"""Tensor parallelism of what was replaced: each rank keeps some heads and some of a feed-forward's width.

    queries, keys, values, gate, up    rows of W: each rank makes its own heads, its own width
    output of attention, down          columns of W: each rank's share, added up over the ranks

After Megatron-LM (Shoeybi et al. 2019). Layers that were not replaced stay whole on every rank.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...core import ConfigError
from .gated import GatedFeedForward
from .joined import Part, Product
from .proof import apart

_OUT = ("o_proj", "out_proj", "dense")


@torch.no_grad()
def cut(model: nn.Module, attentions: list[tuple[str, nn.Module]], group: dist.ProcessGroup) -> int:
    """Leave this rank its part of every attention and feed-forward; how many were cut.

    Raises:
        ConfigError: heads or widths that the ranks cannot share evenly, or nothing that could be cut.
    """
    ranks, rank, done = group.size(), group.rank(), 0
    for name, module in attentions:
        q, out = getattr(module, "q_proj", None), next((getattr(module, n) for n in _OUT if hasattr(module, n)), None)
        if not isinstance(q, Part) or type(out) is not Product:
            continue
        shared, dim = q._shared[0], int(module.head_dim)  # type: ignore[arg-type]
        for part in shared.parts:
            if part.out_features // dim % ranks:
                heads = part.out_features // dim
                raise ConfigError(f"{name}: {heads} heads cannot be shared by {ranks} ranks: choose a divisor of both")
        if _normed_whole(module, q.out_features):
            raise ConfigError(f"{name} normalises all queries together, which ranks with some of them cannot")
        for part in shared.parts:
            _rows(part, ranks, rank)
        shared.join()
        _columns(out, group)
        done += 1
    for name, module in model.named_modules():
        if isinstance(module, GatedFeedForward):
            width = module.shared.parts[0].out_features
            if width % ranks:
                raise ConfigError(f"{name}: a width of {width} cannot be shared by {ranks} ranks")
            for part in module.shared.parts:
                _rows(part, ranks, rank)
            module.shared.join()
            _columns(module.down, group)
            done += 1
    if not done:
        raise ConfigError("tensor_parallel: nothing in this model could be cut; its report says what it is made of")
    return done


def _normed_whole(module: nn.Module, width: int) -> bool:
    return any(p.shape[-1:] == (width,) for name, p in module.named_parameters() if "norm" in name)


def _rows(part: Product, ranks: int, rank: int) -> None:
    part.weight = nn.Parameter(part.weight.chunk(ranks)[rank].clone(), requires_grad=False)
    if part.bias is not None:
        part.bias = nn.Parameter(part.bias.chunk(ranks)[rank].clone(), requires_grad=False)


def _columns(product: Product, group: dist.ProcessGroup) -> None:
    piece = product.weight.chunk(group.size(), 1)[group.rank()]
    product.weight = nn.Parameter(piece.contiguous(), requires_grad=False)
    product.group = group


@torch.no_grad()
def same_everywhere(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Refuse weights that differ among the ranks: each would answer for another model.

    Raises:
        ConfigError: naming the first weight that differs.
    """
    sums = torch.stack([p.double().sum() for p in model.parameters()])
    first = sums.clone()
    dist.broadcast(first, group_src=0, group=group)
    if apart(sums, first) > 0:
        names = [name for name, _ in model.named_parameters()]
        worst: Tensor = (sums != first).nonzero()
        at = int(worst[0]) if len(worst) else 0
        raise ConfigError(f"the ranks' weights differ, first in {names[at]}: load the same checkpoint on each")
