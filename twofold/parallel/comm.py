"""Collectives that autograd goes through: each one's gradient is another's forward.

    copy_to      x on every rank          backward: the ranks' gradients are added
    reduce_from  the ranks' x added       backward: the gradient as it is
    gather       the ranks' parts joined  backward: each its own part
    gather_sum   the ranks' parts joined  backward: gradients added, each its own part
    scatter      each its part of x       backward: the parts joined
    reduce_scatter  x added, each its part   backward: the parts joined
    exchange     part i to rank i         backward: the same, back

With no group (a rank alone on its axis) each is the identity. Parts are equal along `dim` but for `exchange`, which
takes any numbers of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx

Group = dist.ProcessGroup | None

# torch 2.13 gave both new names
all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
sum_scatter: Callable[..., Any] = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def copy_to(x: Tensor, group: Group) -> Tensor:
    """x, which every rank has, on its way into work that is divided among them."""
    return x if group is None else cast(Tensor, _Copy.apply(x, group))


def reduce_from(x: Tensor, group: Group) -> Tensor:
    """The sum of what each rank made."""
    return x if group is None else cast(Tensor, _Reduce.apply(x, group))


def gather(x: Tensor, group: Group, dim: int = 0, *, add: bool = False) -> Tensor:
    """The ranks' equal parts joined; `add`: what follows is divided among ranks, so that their gradients add up."""
    return x if group is None else cast(Tensor, _Gather.apply(x, group, dim, add))


def scatter(x: Tensor, group: Group, dim: int = 0) -> Tensor:
    """This rank's part of what all have."""
    return x if group is None else cast(Tensor, _Scatter.apply(x, group, dim, False))


def reduce_scatter(x: Tensor, group: Group, dim: int = 0) -> Tensor:
    """This rank's part of the sum of what each made."""
    return x if group is None else cast(Tensor, _Scatter.apply(x, group, dim, True))


def exchange(x: Tensor, group: Group, send: Sequence[int], receive: Sequence[int]) -> Tensor:
    """`send[i]` rows of x go to rank i, in order; `receive[i]` rows come from it: [sum(receive), ...]."""
    if group is None:
        return x
    return cast(Tensor, _Exchange.apply(x, group, tuple(send), tuple(receive)))


# --------------------------------------------------------------------------------------------- without autograd
def added(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, group=group)
    return out


def part_of(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    size, rank = group.size(), group.rank()
    if x.shape[dim] % size:
        raise ValueError(f"{x.shape[dim]} along dimension {dim} cannot be divided among {size} ranks")
    return x.chunk(size, dim)[rank].contiguous()


def together(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    first = x.movedim(dim, 0).contiguous()
    out = first.new_empty((group.size() * first.shape[0], *first.shape[1:]))
    all_gather(out, first, group=group)
    return out.movedim(0, dim).contiguous()


def added_part(x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    first = x.movedim(dim, 0).contiguous()
    if first.shape[0] % group.size():
        raise ValueError(f"{x.shape[dim]} along dimension {dim} cannot be divided among {group.size()} ranks")
    out = first.new_empty((first.shape[0] // group.size(), *first.shape[1:]))
    sum_scatter(out, first, group=group)
    return out.movedim(0, dim).contiguous()


def exchanged(x: Tensor, group: dist.ProcessGroup, send: Sequence[int], receive: Sequence[int]) -> Tensor:
    out = x.new_empty((sum(receive), *x.shape[1:]))
    dist.all_to_all_single(out, x.contiguous(), list(receive), list(send), group=group)
    return out


# --------------------------------------------------------------------------------------------- with it
class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return added(grad, ctx.group), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return added(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, dim: int, add: bool) -> Tensor:
        ctx.group, ctx.dim, ctx.add = group, dim, add
        return together(x, group, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        back = added_part if ctx.add else part_of
        return back(grad, ctx.group, ctx.dim), None, None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, dim: int, add: bool) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return (added_part if add else part_of)(x, group, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return together(grad, ctx.group, ctx.dim), None, None, None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: dist.ProcessGroup, send: tuple[int, ...], receive: tuple[int, ...]
    ) -> Tensor:
        ctx.group, ctx.send, ctx.receive = group, send, receive
        return exchanged(x, group, send, receive)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return exchanged(grad, ctx.group, ctx.receive, ctx.send), None, None, None
