"""Score heads and entropy on ranks that divide a model: scores, entropies and every gradient of one process."""

from __future__ import annotations

import pytest
import torch
from test_axes import GEMMA, LLAMA, QWEN
from torch import Tensor
from world import run_ranks

from twofold.models.decoder import Decoder
from twofold.models.packed import PackedContext
from twofold.models.scoring import as_critic, as_reward
from twofold.models.weights import spec_from
from twofold.parallel import Layout, Mesh, ParallelConfig
from twofold.parallel.layout import lay_out
from twofold.train.axes import Axes
from twofold.train.init import init_weights
from twofold.train.places import Places
from twofold.train.zero import Zero, local

CONFIGS = {
    "llama-critic": as_critic(LLAMA),
    "gemma2-critic": as_critic(GEMMA),
    "qwen3-critic": as_critic(QWEN),
    "llama-reward": as_reward(LLAMA, 3),
}
LENGTHS = (5, 8, 3)


def whole_model(name: str) -> Decoder:
    decoder = Decoder(spec_from(CONFIGS[name]))
    init_weights(decoder, 5)
    with torch.no_grad():
        decoder.score.weight.normal_(generator=torch.Generator().manual_seed(2))
    return decoder


def read(decoder: Decoder) -> tuple[Tensor, Tensor]:
    """Scores and entropies (no entropies of a reward model) after the gradient of both."""
    ids = torch.randint(0, 97, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
    hidden = decoder(ids, PackedContext(LENGTHS))
    scores = decoder.scores(hidden)
    entropy = decoder.entropy(hidden, temperature=0.7) if decoder.spec.head else torch.zeros(1)
    (scores.square().sum() + 3 * entropy.sum()).backward()
    return scores.detach(), entropy.detach()


def divided(rank: int, name: str, layout: Layout, config: ParallelConfig) -> float:
    """The largest difference from one process, over scores, entropies and this rank's part of each gradient, as a share
    of the largest number of each.
    """
    whole, axes = whole_model(name), Axes(Mesh(layout, rank), config)
    decoder = axes.divide(whole.spec)
    with torch.no_grad():
        for inner, weight in decoder.named_parameters():
            weight.copy_(axes.part(inner, whole.get_parameter(inner)))
    places = Places(decoder, axes)
    assert places["score.weight"].local == tuple(whole.score.weight.shape)
    off = [apart(mine, right) for mine, right in zip(read(decoder), read(whole), strict=True)]
    axes.collect(decoder)
    for inner, weight in decoder.named_parameters():
        right = whole.get_parameter(inner).grad
        assert weight.grad is not None and right is not None, inner
        off.append(apart(weight.grad, axes.part(inner, right)))
    return max(off)


def apart(mine: Tensor, right: Tensor) -> float:
    return float((mine - right).abs().max() / right.abs().max().clamp_min(1e-6))


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_tensor_parallel_ranks_agree_with_one(name: str, sequence: bool) -> None:
    config = ParallelConfig(tp=2, sequence=sequence)
    assert max(run_ranks(2, divided, name, lay_out(config, 2), config)) < 1e-5


def sliced(rank: int, name: str, layout: Layout) -> tuple[float, int]:
    mesh = Mesh(layout, rank)
    decoder, whole = whole_model(name), whole_model(name)
    zero = Zero(decoder, mesh)
    zero.micro_batch(last=True)
    off = [apart(mine, right) for mine, right in zip(read(decoder), read(whole), strict=True)]
    mine, right = decoder.score.weight.grad, whole.score.weight.grad
    assert mine is not None and right is not None
    rows = (slice(0, 2), slice(2, 3))[rank]
    return max(*off, apart(local(mine), 2 * right[rows])), local(mine).numel()  # both ranks read the same


def test_zero_slices_the_score_head_too() -> None:
    found = run_ranks(2, sliced, "llama-reward", lay_out(ParallelConfig(zero=3), 2))
    assert max(off for off, _ in found) < 1e-5
    assert [numbers for _, numbers in found] == [2 * 32, 32]
