"""A mixture's rules under the other axes: ranks that hold parts of a sequence deal its tokens as one process does."""

from __future__ import annotations

import expert_ranks as here
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from world import run_ranks

from twofold.data import Batch
from twofold.models.parallel import TensorParallel
from twofold.parallel import Layout, Mesh, ParallelConfig
from twofold.train import loss as losses
from twofold.train.axes import Axes
from twofold.train.moe import Routers
from twofold.train.moe_config import MoeConfig

RULES = MoeConfig(balance_loss=0.3, z_loss=0.1, bias_rate=0.01, noise="gumbel")
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def truth(rules: MoeConfig) -> tuple[here.Decoder, Tensor, dict[str, float]]:
    """Two ranks' sequences as one micro-batch of one process."""
    alone = here.model(crowded=False)
    return alone, *here.step(alone, Routers(alone, rules, 5), [[0, 1]], here.first_of(2))


def same_routers(ours: here.Decoder, alone: here.Decoder, figures: dict[str, float], told: dict[str, float]) -> None:
    assert figures == pytest.approx(told, abs=1e-6)
    for layer, other in zip(ours.layers, alone.layers):
        if layer.index != 1:
            assert torch.equal(layer.choice.bias, other.choice.bias)
            torch.testing.assert_close(layer.router.weight.grad, other.router.weight.grad, **CLOSE)


def tensor(rank: int, sequence: bool) -> None:
    alone, hidden_TD, told = truth(RULES)
    group = dist.group.WORLD
    part = TensorParallel(here.spec(), group, sequence=sequence)
    decoder = part.fill(here.model(crowded=False))
    routers = Routers(decoder, RULES, 5, None, group if sequence else None)
    found_TD, figures = here.step(decoder, routers, [[0, 1]], here.first_of(2))
    part.collect()
    torch.testing.assert_close(found_TD, hidden_TD, **CLOSE)
    same_routers(decoder, alone, figures, told)


def ring(rank: int) -> None:
    alone, hidden_TD, told = truth(RULES)
    mesh = Mesh(Layout(sp=2), rank)
    axes, decoder = Axes(mesh, ParallelConfig(sp=2, sp_kind="ring")), here.model(crowded=False)
    (ids, targets), (more_ids, more) = here.tokens(0), here.tokens(1)
    lengths = here.LENGTHS[0] + here.LENGTHS[1]
    whole = Batch(ids_T=torch.cat((ids, more_ids)), targets_T=torch.cat((targets, more)), lengths=lengths)
    ids_T, targets_T, ctx = axes.place(whole)
    routers = Routers(decoder, RULES, 5, mesh.group("tokens"))
    routers.begin(7, len(whole.ids_T))
    found_TD = decoder(ids_T, ctx)
    losses.backward(decoder, found_TD, targets_T, len(whole.ids_T), here.VOCAB)
    figures = routers.end()
    for parameter in decoder.parameters():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
    torch.testing.assert_close(found_TD.detach(), ctx.mine(hidden_TD), **CLOSE)
    same_routers(decoder, alone, figures, told)


@pytest.mark.parametrize("sequence", [False, True])
def test_tensor_parallel(sequence: bool) -> None:
    run_ranks(2, tensor, sequence)


def test_a_ring() -> None:
    run_ranks(2, ring)
