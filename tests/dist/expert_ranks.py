"""What each rank of the expert-parallel tests does: a step on its own sequences, held to one process on all of them.

Rank r of `ranks` stands in ep group r // ep; ranks with equal r % ep have the same experts.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor
from world import run_ranks

from twofold.kernels.moe import experts
from twofold.models.decoder import Decoder
from twofold.models.exchange import expert_rows, joined, split_experts
from twofold.models.packed import PackedContext
from twofold.models.spec import Attention, Gated, Head, LayerSpec, Mixture, ModelSpec, Names, Norm, Pre, Rope
from twofold.train import loss as losses
from twofold.train.moe import Routers
from twofold.train.moe_config import MoeConfig
from twofold.train.recompute import recompute_layers

VOCAB = 61
LENGTHS = ((17, 9), (30,), (5, 5, 11), (24, 2))  # the sequences of each rank


def spec() -> ModelSpec:
    rms = Norm(kind="rms", eps=1e-6)
    mixer = Attention(heads=2, kv_heads=2, head_dim=12, position=Rope(theta=1e4, dim=12))
    mixture = Mixture(experts=8, top_k=3, width=14, act="silu", biased=True, shared_width=10)
    dense = LayerSpec(mixer=mixer, ffn=Gated(width=20, act="silu"), norms=Pre(norm=rms))
    mixed = replace(dense, ffn=mixture)
    return ModelSpec(
        architecture="Tiny",
        hidden=24,
        vocab=VOCAB,
        layers=(mixed, dense, mixed),
        norm=rms,
        head=Head(tied=False),
        names=Names(table={}),
    )


def model(crowded: bool) -> Decoder:
    """The same weights at each call; `crowded`: every token of the first layer chooses experts 0, 1 and 2."""
    decoder = Decoder(spec())
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        if crowded:
            decoder.layers[0].choice.bias[:, :3] = 5.0
    return decoder


def tokens(rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + rank)
    ids = torch.randint(0, VOCAB, (sum(LENGTHS[rank]),), generator=generator)
    return ids, torch.randint(0, VOCAB, ids.shape, generator=generator)


def first_of(rank: int) -> int:
    return sum(sum(lengths) for lengths in LENGTHS[:rank])


def step(decoder: Decoder, routers: Routers, parts: list[list[int]], total: int) -> tuple[Tensor, dict[str, float]]:
    """Forward and backward of micro-batches, each the sequences of some ranks: last hidden states, and the figures."""
    routers.begin(7, total)
    hidden = []
    for ranks in parts:
        ids, targets = (torch.cat(x) for x in zip(*(tokens(r) for r in ranks)))
        places_T = torch.arange(first_of(ranks[0]), first_of(ranks[-1] + 1))
        ctx = PackedContext([n for r in ranks for n in LENGTHS[r]], places_T=places_T)
        out_TD = decoder(ids, ctx)
        losses.backward(decoder, out_TD, targets, total, VOCAB)
        hidden.append(out_TD.detach())
    return torch.cat(hidden), routers.end()


def compare(rank: int, world: int, ep: int, config: MoeConfig, *, together: bool, crowded: bool, again: bool) -> None:
    """One rank's step against one process; `together`: all sequences are one micro-batch there.

    Crowded ones run the definition, in which experts that nobody chose leave nothing for a gradient to come back by.
    """
    if crowded:
        experts.use("reference")
    total = first_of(world)
    alone = model(crowded)
    parts = [list(range(world))] if together else [[r] for r in range(world)]
    truth_TD, told = step(alone, Routers(alone, config, 5), parts, total)

    groups = [dist.new_group(list(range(first, first + ep))) for first in range(0, world, ep)]
    same = [dist.new_group(list(range(place, world, ep))) for place in range(ep)]
    group = groups[rank // ep]
    decoder = model(crowded)
    split_experts(decoder, group)
    if again:
        recompute_layers(decoder)
    hidden_TD, figures = step(decoder, Routers(decoder, config, 5, dist.group.WORLD), [[rank]], total)

    close = {"atol": 1e-5, "rtol": 1e-5}
    mine = slice(first_of(rank), first_of(rank + 1))
    torch.testing.assert_close(hidden_TD, truth_TD[mine], **close)
    assert figures.keys() == told.keys() and figures["moe_busiest"] > 1 / 8
    for key, value in told.items():
        assert abs(figures[key] - value) < 1e-6, (key, figures[key], value)
    for layer, other in zip(decoder.layers, alone.layers):
        if layer.index != 1:
            assert torch.equal(layer.choice.bias, other.choice.bias)
    rows = expert_rows(decoder, ep, rank % ep)
    expected = dict(alone.named_parameters())
    for name, parameter in decoder.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        dist.all_reduce(grad, group=same[rank % ep] if name in rows else dist.group.WORLD)
        wanted = expected[name].grad
        torch.testing.assert_close(grad, wanted[rows[name].slice] if name in rows else wanted, **close, msg=name)
    before = {name: parameter.detach().clone() for name, parameter in decoder.named_parameters()}
    with joined(decoder):
        for name, parameter in decoder.named_parameters():
            assert torch.equal(parameter, expected[name]), name
        served_TD = decoder(tokens(rank)[0], PackedContext(LENGTHS[rank]))
    torch.testing.assert_close(served_TD, alone(tokens(rank)[0], PackedContext(LENGTHS[rank])), atol=0, rtol=0)
    assert all(torch.equal(parameter, before[name]) for name, parameter in decoder.named_parameters())


def run(world: int, ep: int, config: MoeConfig, **how: bool) -> None:
    """All ranks, as processes; raises what the first of them raised."""
    usual = {"together": False, "crowded": False, "again": False}
    run_ranks(world, _compare, world, ep, config, usual | how)


def _compare(rank: int, world: int, ep: int, config: MoeConfig, how: dict[str, bool]) -> None:
    compare(rank, world, ep, config, **how)
