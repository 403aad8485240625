"""Narrow numbers on the wire: what comes out, how many bytes go, and that training still learns."""

from __future__ import annotations

import pytest
import torch
from test_zero import CONFIG, batch
from torch import Tensor
from world import run_ranks

from twofold.core import ConfigError
from twofold.models.decoder import Decoder
from twofold.models.packed import PackedContext
from twofold.models.weights import spec_from
from twofold.parallel import Layout, Mesh, ParallelConfig
from twofold.parallel.compress import BLOCK, Integers, NarrowGather, NarrowReduce, Signs
from twofold.parallel.layout import lay_out
from twofold.train import loss as losses
from twofold.train.config import OptimizerConfig
from twofold.train.init import init_weights
from twofold.train.optimizer import Optimizer
from twofold.train.share import share
from twofold.train.zero import Zero


@pytest.mark.parametrize("bits", [8, 4])
def test_integers_go_round(bits) -> None:
    x = torch.randn(3, 2 * BLOCK) * torch.tensor([[1.0], [1e-6], [0.0]])
    data = Integers(bits).write(x)
    assert data.dtype == torch.uint8 and data.shape == (3, 2 * (BLOCK * bits // 8 + 4))
    back = Integers(bits).read(data)
    step = x.reshape(3, 2, BLOCK).abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    assert ((back - x).reshape(3, 2, BLOCK).abs() <= step * 0.5001).all()
    assert (back[2] == 0).all()


def test_signs_go_round() -> None:
    x = torch.randn(2, BLOCK)
    back = Signs().read(Signs().write(x))
    assert torch.equal(back, torch.where(x >= 0, 1.0, -1.0) * x.abs().mean(-1, keepdim=True))
    assert Signs().write(x).shape == (2, BLOCK // 8 + 4)


def reduced(rank: int, kind, calls: int) -> list[Tensor]:
    group = Mesh(Layout(shard=2), rank).group("zero")
    assert group is not None
    reduce = NarrowReduce(kind, warmup=1)
    out = []
    for call in range(calls):
        grads = torch.randn(2, 2, 300, generator=torch.Generator().manual_seed(9))[rank]
        mine = torch.empty(300)
        reduce(mine, grads.reshape(-1) if call < calls else grads, group)
        out.append(mine)
    return out


@pytest.mark.parametrize("kind, error", [("int8", 0.04), ("int4", 0.6)])
def test_a_sum_is_near(kind, error) -> None:
    whole = torch.randn(2, 2, 300, generator=torch.Generator().manual_seed(9)).sum(0)
    for rank, (first, second) in enumerate(run_ranks(2, reduced, kind, 2)):
        torch.testing.assert_close(first, whole[rank])
        assert 0 < (second - whole[rank]).abs().max() < error


def test_what_a_bit_loses_is_given_back() -> None:
    """With error feedback the mean of many sums of the same gradient goes to the sum."""
    whole = torch.randn(2, 2, 300, generator=torch.Generator().manual_seed(9)).sum(0)
    for rank, found in enumerate(run_ranks(2, reduced, "onebit", 201)):
        sums = torch.stack(found[1:])
        assert (sums[0] - whole[rank]).abs().mean() > 0.3
        assert (sums.mean(0) - whole[rank]).abs().mean() < 0.05


def gathered(rank: int) -> Tensor:
    group = Mesh(Layout(shard=2), rank).group("zero")
    assert group is not None
    out = torch.empty(600)
    NarrowGather()(out, torch.linspace(-1, 1, 300) * (rank + 1), group)
    return out


def test_a_gather_is_near_and_the_same_everywhere() -> None:
    one, other = run_ranks(2, gathered)
    assert torch.equal(one, other)
    whole = torch.cat([torch.linspace(-1, 1, 300), 2 * torch.linspace(-1, 1, 300)])
    assert 0 < (one - whole).abs().max() < 0.01


def learn(rank: int, config: ParallelConfig, steps: int) -> list[float]:
    mesh = Mesh(lay_out(config, 2), rank)
    decoder = Decoder(spec_from(CONFIG))
    init_weights(decoder, 5)
    zero = Zero(decoder, mesh, config=config)
    frozen = config.comm_warmup if config.comm == "onebit" else None
    optimizer = Optimizer(decoder.named_parameters(), OptimizerConfig(lr=3e-3, freeze_step=frozen))
    told = []
    for step in range(steps):
        one = batch(step % 4)
        targets = int((one.targets_T != losses.IGNORE).sum())
        summed = 0.0
        for part in share(one, 2, rank, None):
            zero.micro_batch(last=True)
            hidden = decoder(part.ids_T, PackedContext(part.lengths))
            summed += losses.backward(decoder, hidden, part.targets_T, targets, 97)
        told.append(mesh.sum("loss", summed)[0] / targets)
        optimizer.clip()
        optimizer.step(3e-3)
        optimizer.zero()
    return told


@pytest.mark.parametrize("kind, near", [("int8", 0.02), ("int4", 0.1), ("onebit", 0.1)])
def test_training_learns_as_it_does_plain(kind, near: float) -> None:
    plain = run_ranks(2, learn, ParallelConfig(zero=3), 120)[0]
    narrow = run_ranks(2, learn, ParallelConfig(zero=3, comm=kind, comm_warmup=40), 120)[0]
    ends, first = [sum(told[-4:]) / 4 for told in (plain, narrow)], sum(plain[:4]) / 4  # of all four batches
    assert ends[0] < first - 2
    assert ends[1] == pytest.approx(ends[0], abs=near)
    assert ends[1] != ends[0]


def stage_nought(rank: int) -> str:
    try:
        Zero(Decoder(spec_from(CONFIG)), Mesh(Layout(replicate=2), rank), config=ParallelConfig(comm="int8"))
    except ConfigError as error:
        return str(error)
    return "nothing"


def test_stage_nought_has_nothing_to_narrow() -> None:
    assert "set parallel.zero to 1 or more" in run_ranks(2, stage_nought)[0]
