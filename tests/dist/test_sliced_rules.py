"""Every optimizer over weights in slices is that over whole ones; a fault in one rank's slice is named by all."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from world import run_ranks

from twofold.models.cuts import WHOLE, cuts
from twofold.models.decoder import Decoder
from twofold.models.packed import PackedContext
from twofold.models.spec import Attention, Ffn, Gated, Head, LayerSpec, Mixture, ModelSpec, Names, Norm, Pre
from twofold.parallel import Layout, Mesh, ParallelConfig
from twofold.parallel.layout import lay_out
from twofold.train import fault
from twofold.train import loss as losses
from twofold.train.axes import Axes
from twofold.train.build import build_optimizer
from twofold.train.config import RULES, DataConfig, ModelConfig, OptimizerConfig, Recipe, RunConfig, ScheduleConfig
from twofold.train.init import init_weights
from twofold.train.optimizer import Optimizer
from twofold.train.zero import Zero, local

RMS = Norm(kind="rms", eps=1e-6)


def spec_of(*ffns: Ffn) -> ModelSpec:
    mixer = Attention(heads=4, kv_heads=2, head_dim=5)
    return ModelSpec(
        architecture="Tiny",
        hidden=20,
        vocab=53,
        layers=tuple(LayerSpec(mixer=mixer, ffn=ffn, norms=Pre(norm=RMS)) for ffn in ffns),
        norm=RMS,
        head=Head(tied=True),
        names=Names(table={}),
        max_len=64,
    )


ODD = spec_of(Gated(width=27, act="silu"), Mixture(experts=3, top_k=2, width=13, act="silu", shared_width=11))
EVEN = spec_of(Gated(width=28, act="silu"), Mixture(experts=3, top_k=2, width=14, act="silu", shared_width=10))


def made(layout: Layout, rank: int, name: str, spec: ModelSpec) -> tuple[Axes, Decoder, Zero, Optimizer]:
    axes = Axes(Mesh(layout, rank))
    whole = Decoder(spec)
    init_weights(whole, 5)
    decoder = axes.divide(spec)
    with torch.no_grad():
        for inner, weight in decoder.named_parameters():
            weight.copy_(axes.part(inner, whole.get_parameter(inner)))
    zero = Zero(decoder, axes.mesh)
    recipe = Recipe(
        kind="pretrain",
        model=ModelConfig(from_=Path("nowhere")),
        data=DataConfig(train=("x",)),
        schedule=ScheduleConfig(steps=10),
        run=RunConfig(output=Path("nowhere")),
        optimizer=OptimizerConfig(name=name, lr=0.01),  # type: ignore[arg-type]
    )
    return axes, decoder, zero, build_optimizer(decoder, recipe, axes)


def learn(axes: Axes, decoder: Decoder, zero: Zero, step: int) -> float:
    """A backward pass over this rank's share of a batch of two sequences."""
    draw = torch.Generator().manual_seed(step)
    ids_LT = torch.randint(0, 53, (2, 12), generator=draw)
    mine = ids_LT.tensor_split(axes.mesh.size("data"))[axes.mesh.rank("data")]
    zero.micro_batch(last=True)
    hidden_TD = decoder(mine.flatten(), PackedContext((12,) * len(mine)))
    summed = losses.backward(decoder, hidden_TD, mine.roll(-1, 1).flatten(), 24, 53)
    axes.collect(decoder)
    return summed


def train(rank: int, layout: Layout, name: str, spec: ModelSpec) -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
    """(loss, norm) of each step, and the weights at the end."""
    axes, decoder, zero, optimizer = made(layout, rank, name, spec)
    told = []
    for step in range(10):
        loss = axes.mesh.sum("loss", learn(axes, decoder, zero, step % 2))[0]
        told.append((loss / 24, optimizer.clip()))
        optimizer.step(0.01)
        optimizer.zero()
    with torch.no_grad(), zero.whole():
        return told, {name: p.detach().clone() for name, p in decoder.named_parameters()}


def same(layout: Layout, name: str, spec: ModelSpec) -> None:
    told_alone, whole = train(0, Layout(), name, spec)
    for rank, (told, weights) in enumerate(run_ranks(layout.world, train, layout, name, spec)):
        for (loss, norm), (loss_alone, norm_alone) in zip(told, told_alone, strict=True):
            assert loss == pytest.approx(loss_alone, rel=1e-4)
            assert norm == pytest.approx(norm_alone, rel=1e-2)
        if name == "lion":  # its sign turns where a sum of gradients is nothing but rounding
            continue
        for inner, weight in weights.items():
            right = part_of(inner, whole[inner], layout, rank, spec)
            assert float((weight - right).norm()) <= 1e-3 * float(right.norm()) + 1e-6, inner
    assert told_alone[-1][0] < told_alone[1][0]


def part_of(name: str, whole: Tensor, layout: Layout, rank: int, spec: ModelSpec) -> Tensor:
    cut = cuts(spec).get(name, WHOLE) if layout.tp > 1 else WHOLE
    spans = cut.spans(layout.tp, layout.place(rank, "tp"))
    return torch.cat([whole[(slice(None),) * cut.dim + (span,)] for span in spans], cut.dim) if spans else whole


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("name", RULES)
def test_slices_are_updated_as_the_whole(name: str, stage: int) -> None:
    """Rows do not divide evenly (53 ids, 27 and 13 wide, 3 experts); gradients are added in another order."""
    same(lay_out(ParallelConfig(zero=stage), 2), name, ODD)


@pytest.mark.parametrize("name", ["lamb", "muon"])
@pytest.mark.parametrize("config", [ParallelConfig(tp=2), ParallelConfig(tp=2, zero=3)], ids=["tp", "tp-zero"])
def test_what_tensor_parallel_divides_is_seen_whole(name: str, config: ParallelConfig) -> None:
    same(lay_out(config, 4 if config.zero == 3 else 2), name, EVEN)


def lay(rank: int, layout: Layout, where: str, spoil_forward: bool) -> str:
    """What is said when the last number of rank 1's slice is infinite, of a weight or of its gradient."""
    axes, decoder, zero, optimizer = made(layout, rank, "adamw", ODD)
    weight = decoder.get_parameter(where)
    if spoil_forward and rank == 1:
        local(weight.detach()).view(-1)[-1] = math.inf
    learn(axes, decoder, zero, 0)
    if not spoil_forward and rank == 1:
        local(weight.grad).view(-1)[-1] = math.inf
    assert not math.isfinite(optimizer.clip())
    ids_T = torch.arange(12)
    return fault.explain(
        decoder,
        ((name, optimizer.gradient(name)) for name in optimizer.weights),
        lambda: decoder(ids_T, PackedContext((12,))),
        spoil_forward,
        lambda flags: axes.mesh.sum("zero", *flags),
    )


def test_a_fault_in_a_slice_is_named_by_all() -> None:
    layout = lay_out(ParallelConfig(zero=3), 2)
    said = run_ranks(2, lay, layout, "layers.0.out.weight", False)
    assert said == ["the gradient is not finite, first in layers.0.out"] * 2
    said = run_ranks(2, lay, layout, "layers.0.gate_up.weight", True)
    assert said == ["the loss is not finite, first in the output of layers.0.gate_up"] * 2
