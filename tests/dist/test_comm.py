"""Every collective against what one process computes, forward and backward, on 2 and 4 ranks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from world import run_ranks

from twofold.parallel import Layout, Mesh, comm

WORLDS = (2, 4)


def whole(world: int) -> Tensor:
    return torch.randn(world, 8, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def gradients(rank: int, world: int) -> dict[str, tuple[Tensor, Tensor]]:
    group = Mesh(Layout(shard=world), rank).group("zero")
    x_all, weigh = whole(world), whole(world).flip(0)
    found = {}
    for name, call in {
        "copy_to": lambda x: comm.copy_to(x, group),
        "reduce_from": lambda x: comm.reduce_from(x, group),
        "gather": lambda x: comm.gather(x, group, 1),
        "gather_add": lambda x: comm.gather(x, group, 1, add=True),
        "scatter": lambda x: comm.scatter(x, group),
        "reduce_scatter": lambda x: comm.reduce_scatter(x, group, 0),
    }.items():
        x = x_all[rank].clone().requires_grad_()
        y = call(x)
        factor = weigh[rank].sum() * torch.arange(1.0, 1 + y.numel(), dtype=torch.float64).reshape(y.shape)
        (y * factor).sum().backward()
        found[name] = (y.detach(), x.grad)
    return found


@pytest.mark.parametrize("world", WORLDS)
def test_collectives(world: int) -> None:
    x, weigh = whole(world), whole(world).flip(0)
    factors = [w.sum() for w in weigh]
    got = run_ranks(world, gradients, world)

    def ramp(*shape: int) -> Tensor:
        return torch.arange(1.0, 1 + torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)

    joined = torch.cat(list(x), 1)
    rows = 8 // world
    for rank, found in enumerate(got):
        mine, part = slice(4 * rank, 4 * rank + 4), slice(rows * rank, rows * rank + rows)
        expected = {
            "copy_to": (x[rank], sum(factors) * ramp(8, 4)),
            "reduce_from": (x.sum(0), factors[rank] * ramp(8, 4)),
            "gather": (joined, factors[rank] * ramp(8, 4 * world)[:, mine]),
            "gather_add": (joined, sum(factors) * ramp(8, 4 * world)[:, mine]),
            "scatter": (x[rank][part], torch.cat([f * ramp(rows, 4) for f in factors])),
            "reduce_scatter": (x.sum(0)[part], torch.cat([f * ramp(rows, 4) for f in factors])),
        }
        assert found.keys() == expected.keys()
        for name, pair in expected.items():
            for what, a, b in zip(("forward", "backward"), found[name], pair):
                torch.testing.assert_close(a, b, msg=lambda text, n=name, w=what: f"{n} {w}: {text}")


def uneven(rank: int, world: int) -> tuple[Tensor, Tensor]:
    group = Mesh(Layout(shard=world), rank).group("zero")
    send = [(rank + to) % 3 for to in range(world)]
    receive = [(source + rank) % 3 for source in range(world)]
    x = torch.full((sum(send), 2), float(rank + 1)).requires_grad_()
    y = comm.exchange(x, group, send, receive)
    (y * (rank + 1)).sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize("world", WORLDS)
def test_uneven_exchange(world: int) -> None:
    for rank, (y, grad) in enumerate(run_ranks(world, uneven, world)):
        came = [float(source + 1) for source in range(world) for _ in range((source + rank) % 3)]
        went = [float(to + 1) for to in range(world) for _ in range((rank + to) % 3)]
        assert y[:, 0].tolist() == came
        assert grad[:, 0].tolist() == went


def test_a_failure_of_one_rank_is_told() -> None:
    with pytest.raises(AssertionError, match="cannot be divided among 2 ranks"):
        run_ranks(2, _odd)


def _odd(rank: int) -> None:
    comm.scatter(torch.zeros(3), Mesh(Layout(shard=2), rank).group("zero"))
