"""Every optimizer over weights in slices is that over whole ones; a fault in one rank's slice is named by all."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from world import run_ranks

from twofold.models.decoder import Decoder
from twofold.models.layout import matrices
from twofold.models.packed import PackedContext
from twofold.models.spec import Attention, Gated, Head, LayerSpec, Mixture, ModelSpec, Names, Norm, Pre
from twofold.parallel import Layout, Mesh, ParallelConfig
from twofold.parallel.layout import lay_out
from twofold.train import fault
from twofold.train import loss as losses
from twofold.train.axes import Axes
from twofold.train.config import RULES, OptimizerConfig
from twofold.train.init import init_weights
from twofold.train.optimizer import Optimizer
from twofold.train.zero import Zero, local

RMS = Norm(kind="rms", eps=1e-6)
FFNS = (Gated(width=27, act="silu"), Mixture(experts=3, top_k=2, width=13, act="silu", shared_width=11))
SPEC = ModelSpec(
    architecture="Tiny",
    hidden=20,
    vocab=53,
    layers=tuple(
        LayerSpec(mixer=Attention(heads=4, kv_heads=2, head_dim=5), ffn=ffn, norms=Pre(norm=RMS)) for ffn in FFNS
    ),
    norm=RMS,
    head=Head(tied=True),
    names=Names(table={}),
    max_len=64,
)


def made(layout: Layout, rank: int, name: str) -> tuple[Mesh, Decoder, Zero, Optimizer]:
    mesh = Mesh(layout, rank)
    decoder = Decoder(SPEC)
    init_weights(decoder, 5)
    zero = Zero(decoder, mesh)
    optimizer = Optimizer(
        decoder.named_parameters(),
        OptimizerConfig(name=name, lr=0.01),  # type: ignore[arg-type]
        matrices=matrices(decoder),
        norm=Axes(mesh).norm,
    )
    return mesh, decoder, zero, optimizer


def learn(mesh: Mesh, decoder: Decoder, zero: Zero, step: int) -> float:
    """A backward pass over this rank's half of a batch of two sequences, or over all of it."""
    draw = torch.Generator().manual_seed(step)
    ids_LT = torch.randint(0, 53, (2, 12), generator=draw)
    mine = ids_LT.tensor_split(mesh.size("data"))[mesh.rank("data")]
    targets_T = mine.roll(-1, 1).flatten()
    zero.micro_batch(last=True)
    hidden_TD = decoder(mine.flatten(), PackedContext((12,) * len(mine)))
    return losses.backward(decoder, hidden_TD, targets_T, 24, 53)


def train(rank: int, layout: Layout, name: str) -> tuple[list[tuple[float, float]], list[Tensor]]:
    """(loss, norm) of each step, and the weights at the end."""
    mesh, decoder, zero, optimizer = made(layout, rank, name)
    told = []
    for step in range(10):
        loss = mesh.sum("loss", learn(mesh, decoder, zero, step % 2))[0]
        told.append((loss / 24, optimizer.clip()))
        optimizer.step(0.01)
        optimizer.zero()
    with torch.no_grad(), zero.whole():
        return told, [p.detach().clone() for p in decoder.parameters()]


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("name", RULES)
def test_slices_are_updated_as_the_whole(name: str, stage: int) -> None:
    """Rows do not divide evenly (53 ids, 27 and 13 wide, 3 experts); gradients are added in another order."""
    told_alone, weights_alone = train(0, Layout(), name)
    for told, weights in run_ranks(2, train, lay_out(ParallelConfig(zero=stage), 2), name):
        for (loss, norm), (loss_alone, norm_alone) in zip(told, told_alone, strict=True):
            assert loss == pytest.approx(loss_alone, rel=1e-4)
            assert norm == pytest.approx(norm_alone, rel=1e-2)
        if name != "lion":  # its sign turns where a sum of gradients is nothing but rounding
            for weight, right in zip(weights, weights_alone, strict=True):
                assert float((weight - right).norm()) <= 1e-3 * float(right.norm()) + 1e-6
    assert told_alone[-1][0] < told_alone[1][0]


def lay(rank: int, layout: Layout, where: str, spoil_forward: bool) -> str:
    """What is said when the last number of rank 1's slice is infinite, of a weight or of its gradient."""
    mesh, decoder, zero, optimizer = made(layout, rank, "adamw")
    weight = decoder.get_parameter(where)
    if spoil_forward and rank == 1:
        local(weight.detach()).view(-1)[-1] = math.inf
    learn(mesh, decoder, zero, 0)
    if not spoil_forward and rank == 1:
        local(weight.grad).view(-1)[-1] = math.inf
    assert not math.isfinite(optimizer.clip())
    ids_T = torch.arange(12)
    return fault.explain(
        decoder,
        ((name, optimizer.gradient(name)) for name in optimizer.weights),
        lambda: decoder(ids_T, PackedContext((12,))),
        spoil_forward,
        lambda flags: mesh.sum("zero", *flags),
    )


def test_a_fault_in_a_slice_is_named_by_all() -> None:
    layout = lay_out(ParallelConfig(zero=3), 2)
    said = run_ranks(2, lay, layout, "layers.0.out.weight", False)
    assert said == ["the gradient is not finite, first in layers.0.out"] * 2
    said = run_ranks(2, lay, layout, "layers.0.gate_up.weight", True)
    assert said == ["the loss is not finite, first in the output of layers.0.gate_up"] * 2
