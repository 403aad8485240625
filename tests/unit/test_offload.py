"""Offload: a run whose numbers lie elsewhere has the bits of one that keeps them in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from twofold.core import ConfigError
from twofold.kernels.optimizer import PIECE, Shard
from twofold.models.decoder import Decoder
from twofold.models.layout import matrices
from twofold.models.packed import PackedContext
from twofold.models.spec import Attention, Gated, Head, LayerSpec, ModelSpec, Names, Norm, Pre, Rope
from twofold.train import loss as losses
from twofold.train.config import OptimizerConfig
from twofold.train.init import init_weights
from twofold.train.offload import Offload
from twofold.train.offload_config import OffloadConfig
from twofold.train.optimizer import Optimizer
from twofold.train.recompute import recompute_layers

RMS = Norm(kind="rms", eps=1e-6)
IDS = torch.arange(48).view(2, 24) * 37 % 997
PLACES = {
    "states": {"optimizer": "disk"},
    "states, gradients": {"optimizer": "disk", "gradients": "disk"},
    "weights": {"parameters": "disk"},
    "all": {"optimizer": "disk", "gradients": "disk", "parameters": "disk"},
    "all, not cached": {"optimizer": "disk", "gradients": "disk", "parameters": "disk", "cache": False},
    "host": {"optimizer": "host", "gradients": "host", "parameters": "host"},
    "mixed": {"optimizer": "disk", "gradients": "host"},
}


def spec(tied: bool) -> ModelSpec:
    mixer = Attention(heads=4, kv_heads=2, head_dim=16, position=Rope(theta=1e4, dim=16))
    layer = LayerSpec(mixer=mixer, ffn=Gated(width=96, act="silu"), norms=Pre(norm=RMS))
    return ModelSpec(
        architecture="Test",
        hidden=64,
        vocab=1500,  # the table and its states are more than one tile
        layers=(layer,) * 3,
        norm=RMS,
        head=Head(tied=tied),
        names=Names(table={}),
        max_len=64,
    )


def start(
    offload: Offload, rule: str = "adamw", dtype: torch.dtype = torch.float32, tied: bool = True, full: bool = True
):
    decoder = Decoder(spec(tied), dtype=dtype, device="meta" if offload.keeps_weights else "cpu")
    if offload.keeps_weights:
        offload.place_weights(decoder)
    init_weights(decoder, 3, offload.let_go)
    if full:
        recompute_layers(decoder)
    config = OptimizerConfig(name=rule, lr=0.01, clip=0.5)
    return decoder, Optimizer(decoder.named_parameters(), config, matrices=matrices(decoder), offload=offload)


def step(decoder: Decoder, optimizer: Optimizer) -> tuple[float, float]:
    optimizer.zero()
    summed = 0.0
    for ids in IDS:  # two micro-batches
        hidden_TD = decoder(ids, PackedContext([10, len(ids) - 10]))
        targets = ids.roll(-1)
        summed += losses.backward(decoder, hidden_TD, targets, IDS.numel(), 1500)
        optimizer.collect()
    norm = optimizer.clip()
    optimizer.step(0.01)
    optimizer.zero()
    optimizer.offload.settle()
    return summed, norm


def trained(offload: Offload, steps: int = 3, **how) -> dict[str, Tensor]:
    decoder, optimizer = start(offload, **how)
    told = [step(decoder, optimizer) for _ in range(steps)]
    return {"told": torch.tensor(told, dtype=torch.float64), **dict(decoder.named_parameters()), **optimizer.state()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, x in one.items():
        assert torch.equal(x, other[name]), name


def on_disk(folder: Path, places: dict[str, str]) -> Offload:
    return Offload(OffloadConfig(tile=1 << 20, buffers=2, **places), folder)


@pytest.mark.parametrize("full", [True, False], ids=["recomputed", "kept"])
@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
def test_the_bits_of_a_run_in_memory(places, full: bool, tmp_path: Path) -> None:
    same(trained(Offload(), full=full), trained(on_disk(tmp_path, places), full=full))


@pytest.mark.parametrize("rule", ["sgd", "lion", "adagrad", "adam", "lamb", "muon"])
def test_every_rule(rule: str, tmp_path: Path) -> None:
    same(trained(Offload(), rule=rule), trained(on_disk(tmp_path, PLACES["all"]), rule=rule))


@pytest.mark.parametrize("rule", ["adamw", "muon"])
def test_narrow_weights_and_their_masters(rule: str, tmp_path: Path) -> None:
    """Untied, for a tied table's two gradients are summed in bf16 by autograd and in fp32 where they are kept."""
    how = {"rule": rule, "dtype": torch.bfloat16, "tied": False}
    same(trained(Offload(), **how), trained(on_disk(tmp_path, PLACES["all"]), **how))


def test_a_state_goes_round_between_places(tmp_path: Path) -> None:
    straight = trained(Offload(), 4)
    decoder, optimizer = start(on_disk(tmp_path, PLACES["all"]))
    for _ in range(2):
        step(decoder, optimizer)
    saved, state = {n: p.detach().clone() for n, p in decoder.named_parameters()}, optimizer.state()
    for offload in (Offload(), on_disk(tmp_path, PLACES["states"])):
        again, its = start(offload)
        again.load_state_dict(saved)
        its.load({name: x.clone() for name, x in state.items()})
        told = [step(again, its) for _ in range(2)]
        assert torch.equal(straight["told"][2:], torch.tensor(told, dtype=torch.float64))
        for name, x in {**dict(again.named_parameters()), **its.state()}.items():
            assert torch.equal(straight[name], x), name


def test_a_gradient_leaves_when_it_is_there_and_may_be_spoiled(tmp_path: Path) -> None:
    decoder, optimizer = start(on_disk(tmp_path, PLACES["all"]))
    hidden_TD = decoder(IDS[0], PackedContext([24]))
    losses.backward(decoder, hidden_TD, IDS[0].roll(-1), 24, 1500)
    assert all(p.grad is None for p in decoder.parameters())
    assert all(optimizer.gradient(name).count_nonzero() for name in optimizer.weights)
    optimizer.gradient("layers.1.qkv.weight")[3, 5] = torch.inf
    assert not torch.isfinite(torch.tensor(optimizer.clip()))
    optimizer.zero()
    assert optimizer.gradient("layers.1.qkv.weight") is None


def test_tiles_are_small_cut_where_kernels_cut_and_cover_all(tmp_path: Path) -> None:
    offload = on_disk(tmp_path, {"optimizer": "disk"})
    sizes = [(3 * PIECE + 7,), (5,), (20, PIECE), (1,), (2, 3)]
    shards = [
        Shard(torch.zeros(size), torch.ones(size), (offload.zeros(f"a{i}", size), offload.zeros(f"b{i}", size)), 1, 0.1)
        for i, size in enumerate(sizes)
    ]
    groups = list(offload.tiles(shards))
    moved = [sum(x.nbytes for shard in group for x in shard.states) for group in groups]
    assert max(moved) <= 1 << 20 and len(groups) > 2
    assert sum(moved) == sum(2 * x.weight.nbytes for x in shards)
    for group in groups:
        for part in group:
            (whole,) = [
                x for x in shards if x.weight.untyped_storage().data_ptr() == part.weight.untyped_storage().data_ptr()
            ]
            assert part.weight.storage_offset() % PIECE == 0
            for mine, its in zip((part.grad, *part.states), (whole.grad, *whole.states)):
                assert (mine.data_ptr() - its.data_ptr()) // 4 == part.weight.storage_offset()
                assert mine.numel() == part.weight.numel()
    assert [len(group) for group in offload.tiles(shards, whole=True)] != [len(shards)]
    assert all(part.weight.shape in sizes for group in offload.tiles(shards, whole=True) for part in group)
    assert list(Offload().tiles(shards)) == [shards]


def test_layers_are_brought_one_ahead_and_let_go_behind(tmp_path: Path, monkeypatch) -> None:
    offload = on_disk(tmp_path, PLACES["weights"])
    decoder, _ = start(offload)
    pool = offload._pools["disk"]
    names = {x.data_ptr(): name for name, x in pool.tensors.items()}
    happened: list[str] = []

    def told(what: str, original):
        def call(*tensors, **how):
            for name in dict.fromkeys(names[x.data_ptr()].removeprefix("weight.") for x in tensors):
                stop = name.split(".")[1] if name.startswith("layers") else name.split(".")[0]
                if not happened or happened[-1] != f"{what} {stop}":
                    happened.append(f"{what} {stop}")
            return original(*tensors, **how)

        return call

    for what in ("bring", "let_go"):
        monkeypatch.setattr(pool, what, told(what, getattr(pool, what)))
    hidden_TD = decoder(IDS[0], PackedContext([24]))
    ends, back = ["let_go embed", "let_go norm"], ["bring embed", "bring norm"]  # the head is the embedding
    assert happened == [*ends, "bring 1", "let_go 0", "bring 2", "let_go 1", *ends, *back]
    happened.clear()
    losses.backward(decoder, hidden_TD, IDS[0].roll(-1), 24, 1500)
    assert happened == [*ends, "bring 1", "let_go 2", "bring 0", "let_go 1", *ends, "bring embed"]


def test_settings_that_cannot_be_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"offload\.tile must be 1048576 or more"):
        OffloadConfig(tile=1000)
    with pytest.raises(ConfigError, match="needs a directory"):
        Offload(OffloadConfig(optimizer="disk"))
    with pytest.raises(ConfigError, match="is not a directory"):
        Offload(OffloadConfig(optimizer="disk", directory=tmp_path / "nowhere"))
