"""Experts divided among ranks, and what is left of them by ZeRO: the losses, norms and weights of one process."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from world import run_ranks

from twofold.data import Batch
from twofold.models.decoder import Decoder
from twofold.models.exchange import split_experts
from twofold.models.packed import PackedContext
from twofold.models.weights import spec_from
from twofold.parallel import Layout, Mesh
from twofold.train import loss as losses
from twofold.train.axes import Axes
from twofold.train.config import OptimizerConfig
from twofold.train.init import init_weights
from twofold.train.moe import Routers
from twofold.train.moe_config import MoeConfig
from twofold.train.optimizer import Optimizer
from twofold.train.recompute import recompute_layers
from twofold.train.share import share
from twofold.train.zero import Zero

CONFIG = {
    "architectures": ["Ernie4_5_MoeForCausalLM"], "model_type": "ernie4_5_moe", "vocab_size": 97, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 16,
    "moe_num_shared_experts": 1,
}  # fmt: skip
RULES = MoeConfig(balance_loss=0.02, z_loss=1e-3, bias_rate=1e-3, noise="gumbel")


def batch(step: int) -> Batch:
    source = torch.Generator().manual_seed(step)
    lengths = torch.randint(1, 40, (9,), generator=source).tolist()
    ids = torch.randint(0, 97, (sum(lengths),), generator=source)
    targets = torch.where(torch.rand(len(ids), generator=source) < 0.3, losses.IGNORE, ids.roll(-1))
    return Batch(ids_T=ids, targets_T=targets, lengths=tuple(lengths))


def train(rank: int, layout: Layout, again: bool) -> tuple[list[tuple[float, ...]], dict[str, Tensor]]:
    """(loss, gradient norm, busiest share, balance) of six steps, and all that the model holds at the end."""
    mesh = Mesh(layout, rank)
    decoder = Decoder(spec_from(CONFIG))
    init_weights(decoder, 5)
    split_experts(decoder, mesh.group("ep"))
    if again:
        recompute_layers(decoder)
    zero = Zero(decoder, mesh)
    optimizer = Optimizer(decoder.named_parameters(), OptimizerConfig(lr=1e-2), norm=Axes(mesh).norm)
    routers = Routers(decoder, RULES, 3, mesh.group("tokens"))
    told = []
    for step in range(6):
        whole = batch(step % 3)
        targets = int((whole.targets_T != losses.IGNORE).sum())
        (part,) = share(whole, mesh.size("data"), mesh.rank("data"), None)
        zero.micro_batch(last=True)
        routers.begin(step, len(whole.ids_T))
        hidden_TD = decoder(part.ids_T, PackedContext(part.lengths, places_T=part.places()))
        summed = losses.backward(decoder, hidden_TD, part.targets_T, targets, 97)
        norm = optimizer.clip()
        optimizer.step(1e-2)
        optimizer.zero()
        figures = routers.end()
        told.append((mesh.sum("loss", summed)[0] / targets, norm, figures["moe_busiest"], figures["moe_balance"]))
    with torch.no_grad(), zero.whole() as model:
        held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        return told, {name: tensor.detach().clone() for name, tensor in held.items()}


@pytest.mark.parametrize(
    ("layout", "again"),
    [
        (Layout(shard=2, ep=2, stage=3), False),
        (Layout(shard=4, ep=2, stage=2), False),
        (Layout(shard=4, ep=4, stage=3), True),
        (Layout(replicate=2, shard=2, ep=2, stage=3), False),
    ],
    ids=["2 ranks", "4 ranks, 2 copies", "4 ranks", "hybrid"],
)
def test_the_run_of_one_process(layout: Layout, again: bool) -> None:
    alone, model = train(0, Layout(), again=False)
    for told, found in run_ranks(layout.world, train, layout, again):
        for mine, truth in zip(told, alone):
            assert mine == pytest.approx(truth, abs=1e-5, rel=1e-4)
        assert found.keys() == model.keys()
        for name, tensor in model.items():
            torch.testing.assert_close(found[name], tensor, atol=1e-4, rtol=1e-3, msg=name)
    assert alone[-1][0] < alone[0][0]
