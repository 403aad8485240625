"""ZeRO: every stage gives the losses, the gradient norms and the weights of one process."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from world import run_ranks

from twofold.data import Batch
from twofold.models.decoder import Decoder
from twofold.models.packed import PackedContext
from twofold.models.weights import spec_from
from twofold.parallel import Layout, Mesh, ParallelConfig
from twofold.parallel.layout import lay_out
from twofold.train import loss as losses
from twofold.train.axes import Axes
from twofold.train.config import OptimizerConfig
from twofold.train.init import init_weights
from twofold.train.optimizer import Optimizer
from twofold.train.share import share
from twofold.train.zero import Zero

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 97, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": True,
}  # fmt: skip


def batch(step: int) -> Batch:
    """Sequences of many lengths, some without anything to learn."""
    source = torch.Generator().manual_seed(step)
    lengths = torch.randint(1, 40, (7,), generator=source).tolist()
    ids = torch.randint(0, 97, (sum(lengths),), generator=source)
    targets = torch.where(torch.rand(len(ids), generator=source) < 0.3, losses.IGNORE, ids.roll(-1))
    return Batch(ids_T=ids, targets_T=targets, lengths=tuple(lengths))


def train(
    rank: int, layout: Layout, steps: int, micro: int | None, tied: bool
) -> tuple[list[tuple[float, float]], Tensor]:
    """(loss, gradient norm) of every step, and an embedding at the end."""
    mesh = Mesh(layout, rank)
    decoder = Decoder(spec_from(CONFIG | {"tie_word_embeddings": tied}))
    init_weights(decoder, 5)
    zero = Zero(decoder, mesh)
    optimizer = Optimizer(decoder.named_parameters(), OptimizerConfig(lr=1e-2), norm=Axes(mesh).norm)
    told = []
    for step in range(steps):
        whole = batch(step % 3)
        targets = int((whole.targets_T != losses.IGNORE).sum())
        parts = share(whole, mesh.size("data"), mesh.rank("data"), micro)
        summed = 0.0
        for number, part in enumerate(parts, 1):
            zero.micro_batch(last=number == len(parts))
            hidden_TD = decoder(part.ids_T, PackedContext(part.lengths))
            summed += losses.backward(decoder, hidden_TD, part.targets_T, targets, 97)
        norm = optimizer.clip()
        told.append((mesh.sum("loss", summed)[0] / targets, norm))
        optimizer.step(1e-2)
        optimizer.zero()
    with torch.no_grad(), zero.whole():
        return told, decoder.embed.weight.detach().clone()


STAGES = [ParallelConfig(zero=stage) for stage in (0, 1, 2, 3)]


@pytest.mark.parametrize("config", STAGES, ids=lambda c: f"stage{c.zero}")
@pytest.mark.parametrize("micro", [None, 40])
def test_two_ranks(config: ParallelConfig, micro: int | None) -> None:
    same(lay_out(config, 2), micro, tied=True)


@pytest.mark.parametrize("stage", [1, 3, "hybrid"])
def test_four_ranks(stage) -> None:
    same(lay_out(ParallelConfig(zero=stage, node=2), 4), 60, tied=False)


def two_passes(rank: int, config: ParallelConfig) -> tuple[bool, str]:
    """Whether FSDP2 divided the decoder, and what a second pass says that nobody announced."""
    decoder = Decoder(spec_from(CONFIG))
    init_weights(decoder, 5)
    zero = Zero(decoder, Mesh(lay_out(config, 2), rank))
    zero.micro_batch(last=True)
    try:
        for _ in range(2):
            decoder(torch.arange(9) + rank, PackedContext((9,))).sum().backward()
    except RuntimeError as error:
        return bool(zero.parts), str(error)
    return bool(zero.parts), ""


def test_gradients_that_travel_as_they_lie_travel_once() -> None:
    for parts, said in run_ranks(2, two_passes, ParallelConfig(zero=0)):
        assert not parts and "call Zero.micro_batch before a pass" in said
    for parts, said in run_ranks(2, two_passes, ParallelConfig(zero=1)):
        assert parts and not said


def test_more_ranks_than_sequences_with_something_to_learn() -> None:
    assert [len(part.ids_T) for rank in range(9) for part in share(batch(0), 9, rank, None)].count(1) >= 2
    same(lay_out(ParallelConfig(zero=3), 4), 4, tied=True, steps=4)


def same(layout: Layout, micro: int | None, tied: bool, steps: int = 20) -> None:
    alone, table = train(0, Layout(), steps, micro, tied)
    for told, found in run_ranks(layout.world, train, layout, steps, micro, tied):
        for (loss, norm), (loss_alone, norm_alone) in zip(told, alone):
            assert loss == pytest.approx(loss_alone, abs=1e-6, rel=1e-6)
            assert norm == pytest.approx(norm_alone, rel=1e-4)
        torch.testing.assert_close(found, table, atol=2e-5, rtol=1e-3)
    assert alone[-1][0] < alone[(steps - 1) % 3][0]
