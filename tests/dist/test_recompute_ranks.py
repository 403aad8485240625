"""Recomputation on every axis: what is run again has the same collectives, and the gradients the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from world import run_ranks

from twofold.data import Batch
from twofold.models.decoder import Decoder
from twofold.models.weights import spec_from
from twofold.parallel import Mesh, ParallelConfig
from twofold.parallel.layout import lay_out
from twofold.train import loss as losses
from twofold.train.axes import Axes
from twofold.train.collectives import CommProfile
from twofold.train.init import init_weights
from twofold.train.kept import Disk
from twofold.train.meter import forward_flops
from twofold.train.profile import TIMED, WARM, Profile
from twofold.train.recompute import recompute_layers
from twofold.train.zero import Zero, local

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 97, "hidden_size": 32, "head_dim": 8,
    "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip
POLICIES = ("none", "selective", "attention", "ffn", "full", "every-2")


def gradients(config: ParallelConfig, mesh: Mesh, policy: str, disk: bool) -> dict[str, torch.Tensor]:
    axes, spec = Axes(mesh, config), spec_from(CONFIG)
    whole = Decoder(spec)
    init_weights(whole, 5)
    source = dict(whole.named_parameters())
    decoder = axes.divide(spec)
    with torch.no_grad():
        for name, p in decoder.named_parameters():
            p.copy_(axes.part(name, source[name]))
    recompute_layers(decoder, policy, keeper=Disk() if disk else None)
    zero = Zero(decoder, mesh, roots=axes.pipeline.stages if axes.pipeline else ())
    ids = torch.randint(0, 97, (90,), generator=torch.Generator().manual_seed(3))
    parts = axes.share(Batch(ids_T=ids, targets_T=ids.roll(-1), lengths=(33, 17, 40)), None)
    if axes.pipeline:
        axes.pipeline.run([axes.place(part) for part in parts], len(ids), decoder, losses.next_token)
    for number, part in enumerate([] if axes.pipeline else parts, 1):
        zero.micro_batch(last=number == len(parts))
        mine, wanted, ctx = axes.place(part)
        losses.backward(decoder, decoder(mine, ctx), wanted, len(ids), 97)
    axes.collect(decoder)
    return {name: local(p.grad) for name, p in decoder.named_parameters() if p.grad is not None}


def different(rank: int, config: ParallelConfig) -> list[str]:
    """Policies whose gradients are not those of keeping everything, and the first parameter that says so."""
    mesh = Mesh(lay_out(config, 2), rank)
    expected = gradients(config, mesh, "none", False)
    assert len(expected) > 10
    wrong = []
    for policy in POLICIES:
        found = gradients(config, mesh, policy, disk=policy in ("none", "attention"))
        assert found.keys() == expected.keys()
        wrong += [f"{policy}: {name}" for name in found if not torch.equal(found[name], expected[name])][:1]
    return wrong


CONFIGS = {
    "tensor": ParallelConfig(tp=2),
    "tensor and tokens": ParallelConfig(tp=2, sequence=True),
    "ulysses": ParallelConfig(sp=2),
    "ring, sharded": ParallelConfig(sp=2, sp_kind="ring", zero=3),
    "pipeline": ParallelConfig(pp=2),
    "zero bubble": ParallelConfig(pp=2, pp_schedule="zero_bubble", pp_stages=2),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_policy_has_the_gradients_of_keeping_all(name: str) -> None:
    assert run_ranks(2, different, CONFIGS[name]) == [[], []]


def profiled(rank: int, config: ParallelConfig, folder: str) -> tuple[list[str], dict[str, int], int]:
    """What was said of some steps, FLOPs by phase and bytes held."""
    mesh, said = Mesh(lay_out(config, 2), rank), list[str]()
    axes, spec = Axes(mesh, config), spec_from(CONFIG)
    decoder = axes.divide(spec)
    init_weights(decoder, 5)
    recompute_layers(decoder, "full")
    zero = Zero(decoder, mesh, roots=axes.pipeline.stages if axes.pipeline else ())
    ids = torch.arange(80) % 97
    modules, comm = Profile(decoder, Path(folder), said.append), CommProfile(Path(folder), said.append)
    for _ in range(WARM + 1 + TIMED):
        with modules(), comm():
            parts = axes.share(Batch(ids_T=ids, targets_T=ids.roll(-1), lengths=(40, 40)), None)
            if axes.pipeline:
                axes.pipeline.run([axes.place(part) for part in parts], 80, decoder, losses.next_token)
            for part in [] if axes.pipeline else parts:
                zero.micro_batch(last=True)
                mine, wanted, ctx = axes.place(part)
                losses.backward(decoder, decoder(mine, ctx), wanted, 80, 97)
    total = modules.tree().total()
    return said, {phase: count for phase, count in total.flops.items() if count}, total.held


@pytest.mark.parametrize("config", [ParallelConfig(zero=3), ParallelConfig(pp=2)], ids=["sharded", "pipeline"])
def test_a_profile_of_one_rank_is_its_part_of_the_work(config: ParallelConfig, tmp_path: Path) -> None:
    (said, first, held), (silence, second, _) = run_ranks(2, profiled, config, str(tmp_path))
    assert len(said) == 4 and not silence and {"profile.json", "comm.json"} == {p.name for p in tmp_path.iterdir()}
    whole = forward_flops(spec_from(CONFIG), (40, 40), 80)
    assert first["forward"] + second["forward"] == whole
    last = 4 * 2 * 80 * 32 * 48  # the product that each layer ends with
    assert first["again"] + second["again"] == whole - last - 2 * 80 * 32 * 97
    assert "all_gather" in "".join(said) if config.zero == 3 else "send" in "".join(said)
    assert 0 < held < 40 * 80 * 32 * 4
