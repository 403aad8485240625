"""The engine in one process: groups, schedules, accumulation, narrow weights, checkpoints and what is told."""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import twofold
from twofold.core import CheckpointError, ConfigError, StateError
from twofold.train import deepspeed
from twofold.train.deepspeed import Engine, checkpoint
from twofold.train.deepspeed.blocks import blocks_of

ADAMW = {"type": "AdamW", "params": {"lr": 1e-2, "eps": 1e-5}}


class Net(nn.Module):
    """Two blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.head(x).float().square().mean()


def start(model: nn.Module | None = None, *, optimizer: Any = None, parameters: Any = None, **config: Any) -> Engine:
    settings = {"train_batch_size": 4, "optimizer": ADAMW, **config}
    if optimizer is not None:
        del settings["optimizer"]
    return twofold.initialize(model=model or Net(), optimizer=optimizer, model_parameters=parameters, config=settings)[
        0
    ]


def advance(engine: Engine, steps: int, first: int = 0) -> list[float]:
    told = []
    for step in range(first, first + steps):
        x = torch.randn(4, 4, generator=torch.Generator().manual_seed(step))
        x = x.to(next(engine.module.parameters()).dtype)
        told.append(float(engine.backward(engine(x)).detach()))
        engine.step()
    return told


# --------------------------------------------------------------------------------------------- what is trained
def test_groups_have_rates_and_decays_of_their_own() -> None:
    ours, theirs = Net(), Net()

    def groups(model: Net) -> list[dict[str, Any]]:
        return [
            {"params": list(model.layers.parameters()), "lr": 1e-3},
            {"params": model.head.weight, "weight_decay": 0.5},
            {"params": [model.head.bias]},
        ]

    engine = start(ours, parameters=groups(ours))
    torch_one = torch.optim.AdamW(groups(theirs), lr=1e-2, eps=1e-5, weight_decay=0.0)
    advance(engine, 3)
    for step in range(3):
        theirs(torch.randn(4, 4, generator=torch.Generator().manual_seed(step))).backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        torch_one.step()
        torch_one.zero_grad()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters()):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-5, msg=name)
    assert engine.get_lr() == [1e-3, 1e-2, 1e-2]


def test_what_is_frozen_or_left_out_stays() -> None:
    model = Net()
    model.layers[0].requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    advance(start(model, parameters=[*model.layers.parameters(), model.head.bias]), 2)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"layers.1.weight", "layers.1.bias", "head.bias"}


def test_parameters_that_cannot_be() -> None:
    model = Net()
    for parameters, words in (
        ([nn.Parameter(torch.ones(2))], "no parameter of the model"),
        ([{"params": model.head.weight}, {"params": [model.head.weight]}], "'head.weight' twice"),
        ([], "no parameter is trained"),
    ):
        with pytest.raises(ConfigError, match=words):
            start(model, parameters=parameters)
    with pytest.raises(ConfigError, match="dimensions"):
        model.head.bias.use_muon = True
        twofold.initialize(model=model, config={"train_batch_size": 4, "optimizer": {"type": "Muon"}})


def test_an_optimizer_that_has_stepped_is_refused() -> None:
    model = Net()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 4)).backward()
    optimizer.step()
    with pytest.raises(ConfigError, match="stepped already"):
        start(model, optimizer=optimizer)


def test_a_clients_schedule(capsys: pytest.CaptureFixture[str]) -> None:
    def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    config = {"train_batch_size": 4, "optimizer": ADAMW, "scheduler": {"type": "WarmupLR"}}
    engine, *_, found = twofold.initialize(model=Net(), config=config, lr_scheduler=schedule)
    advance(engine, 3)
    assert isinstance(found, torch.optim.lr_scheduler.LambdaLR)
    assert engine.get_lr() == pytest.approx([1e-2 / 4])
    assert "not used is the ds_config's scheduler" in capsys.readouterr().out


def test_arguments(tmp_path: Path) -> None:
    place = tmp_path / "ds.json"
    place.write_text(json.dumps({"train_batch_size": 4}))
    deepspeed.init_distributed()  # alone there is nobody to meet
    args = deepspeed.add_config_arguments(argparse.ArgumentParser()).parse_args(["--deepspeed_config", str(place)])
    engine, optimizer, loader, schedule = twofold.initialize(args, Net())
    assert (optimizer, loader, schedule) == (None, None, None)
    engine.backward(engine(torch.ones(1, 4)))
    with pytest.raises(ConfigError, match="no optimizer"):
        engine.step()
    for wrong in ({}, {"model": Net()}, {"model": Net(), "config": place, "mpu": object()}):
        with pytest.raises(ConfigError):
            twofold.initialize(**wrong)


# --------------------------------------------------------------------------------------------- steps
def test_accumulation_that_the_script_owns() -> None:
    engine = start(train_batch_size=12, gradient_accumulation_steps=3, managed_gradient_accumulation=False)
    moved = []
    for last in (False, True, False, False, True):
        engine.set_gradient_accumulation_boundary(last)
        advance(engine, 1)
        moved.append(engine.global_steps)
    assert moved == [0, 1, 1, 1, 2] and engine.micro_steps == 5


def test_step_inside_no_sync_is_an_error() -> None:
    engine = start()
    with engine.no_sync(), pytest.raises(StateError, match="no_sync"):
        engine.step()
    with pytest.raises(ConfigError, match="divides them"), start(zero_optimization={"stage": 2}).no_sync():
        pass


def test_a_loss_of_many_numbers_is_refused() -> None:
    engine = start()
    with pytest.raises(ConfigError, match=r"shape \[3\]"):
        engine.backward(torch.ones(3, requires_grad=True))


def test_activations_in_host_memory_change_no_number() -> None:
    assert advance(start(activation_checkpointing={"cpu_checkpointing": True}), 3) == advance(start(), 3)


def test_the_clip_and_none() -> None:
    sgd = {"type": "SGD", "params": {"lr": 1.0}}

    def moved(clip: float) -> tuple[float, float]:
        model = Net()
        before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
        config = {"train_batch_size": 4, "gradient_clipping": clip, "optimizer": sgd}
        engine, *_ = twofold.initialize(model=model, config=config)
        advance(engine, 1)
        norm = engine.get_global_grad_norm()
        assert norm is not None
        return float((torch.cat([p.detach().flatten() for p in model.parameters()]) - before).norm()), norm

    clipped, norm = moved(1e-3)
    assert clipped == pytest.approx(1e-3, rel=1e-2) and norm > 1e-2
    assert moved(0)[0] == pytest.approx(norm, rel=1e-4)


def test_autocast_multiplies_narrow() -> None:
    engine = start(torch_autocast={"enabled": True})
    seen = []
    engine.module.layers[0].register_forward_hook(
        lambda module, args, out: seen.append((out.dtype, module.weight.dtype))
    )
    advance(engine, 1)
    assert seen == [(torch.bfloat16, torch.float32)]


def test_auto_cast_makes_inputs_narrow() -> None:
    engine = start(fp16={"enabled": True, "auto_cast": True, "initial_scale_power": 4})
    engine.backward(engine(torch.ones(4, 4)))  # fp32 in, or the first product would fail
    engine.step()
    assert engine.was_step_applied() and engine.loss_scale == 16.0


def test_masters_keep_what_narrow_weights_cannot() -> None:
    config = {"train_batch_size": 4, "bf16": {"enabled": True}, "optimizer": {"type": "SGD", "params": {"lr": 1e-5}}}
    engine, *_ = twofold.initialize(model=Net(), config=config)
    narrow = engine.module.head.weight.detach().clone()
    masters = engine.masters.params["head.weight"].detach().clone()
    advance(engine, 1)
    assert torch.equal(engine.module.head.weight, narrow)
    assert not torch.equal(engine.masters.params["head.weight"], masters)


# --------------------------------------------------------------------------------------------- checkpoints
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("client", [False, True])
def test_a_run_that_goes_on_has_the_bits_of_one_that_never_stopped(tmp_path: Path, dtype: str, client: bool) -> None:
    narrow = {} if dtype == "fp32" else {dtype: {"enabled": True}}
    config = narrow | {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 4}}}

    def make() -> Engine:
        optimizer = (lambda groups: torch.optim.NAdam(groups, lr=1e-2)) if client else None
        return start(optimizer=optimizer, **config)

    one, two = make(), make()
    advance(one, 3)
    assert one.save_checkpoint(tmp_path, client_state={"a": {"b": [1, None, 0.5]}})
    path, state = two.load_checkpoint(tmp_path)
    assert (path, state) == (str(tmp_path / "global_step3"), {"a": {"b": [1, None, 0.5]}})
    assert (two.global_steps, two.get_lr()) == (3, one.get_lr())
    assert advance(one, 3, 3) == advance(two, 3, 3)
    saved = load_file(tmp_path / "global_step3" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_states_on_disk_have_the_bits_of_those_in_memory(tmp_path: Path, dtype: str) -> None:
    narrow = {} if dtype == "fp32" else {dtype: {"enabled": True}}
    disk = {"offload_optimizer": {"device": "nvme", "nvme_path": str(tmp_path)}}
    kept, away, later = (
        start(**narrow),
        start(**narrow, zero_optimization=disk),
        start(**narrow, zero_optimization=disk),
    )
    assert advance(kept, 3) == advance(away, 3)
    away.save_checkpoint(tmp_path / "saved")
    advance(later, 1)
    later.load_checkpoint(tmp_path / "saved")
    assert advance(kept, 3, 3) == advance(later, 3, 3)
    with pytest.raises(ConfigError, match="a client's has its states itself"):
        start(optimizer=torch.optim.SGD, zero_optimization=disk)


def test_another_rules_states_are_told(tmp_path: Path) -> None:
    engine = start()
    advance(engine, 1)
    engine.save_checkpoint(tmp_path)
    lion, *_ = twofold.initialize(model=Net(), config={"train_batch_size": 4, "optimizer": {"type": "Lion"}})
    with pytest.raises(CheckpointError, match="has states of adamw, this optimizer's groups are of lion"):
        lion.load_checkpoint(tmp_path)


def test_tags(tmp_path: Path) -> None:
    engine = start()
    assert engine.load_checkpoint(tmp_path) == (None, None)
    engine.save_checkpoint(tmp_path, tag="first")
    advance(engine, 1)
    engine.save_checkpoint(tmp_path)
    engine.save_checkpoint(tmp_path, tag="other", save_latest=False)
    assert (tmp_path / "latest").read_text() == "global_step1"
    assert engine.load_checkpoint(tmp_path, tag="first")[0] == str(tmp_path / "first")
    assert engine.global_steps == 0
    with pytest.raises(CheckpointError, match="newest that is whole: tag='other'"):
        engine.load_checkpoint(tmp_path, tag="second")


@pytest.mark.parametrize(
    "file", ["model.safetensors", "state-00001-of-00001.safetensors", "engine.json", "manifest.json"]
)
@pytest.mark.parametrize("how", ["bit", "truncated", "missing"])
def test_damage_is_named_and_the_newest_whole_one(tmp_path: Path, file: str, how: str) -> None:
    engine = start()
    engine.save_checkpoint(tmp_path, tag="good")
    advance(engine, 1)
    engine.save_checkpoint(tmp_path)
    path = tmp_path / "global_step1" / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink() if how == "missing" else path.write_bytes(data if how == "bit" else data[:-1])
    before = engine.module.head.weight.detach().clone()
    with pytest.raises(CheckpointError, match=f"{file}.*tag='good'"):
        engine.load_checkpoint(tmp_path)
    assert torch.equal(engine.module.head.weight, before)
    engine.load_checkpoint(tmp_path, tag="good")


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start()
    engine.save_checkpoint(tmp_path)

    def full(path: Path, tensors: Any) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(checkpoint, "write_shard", full)
    advance(engine, 1)
    with pytest.raises(CheckpointError, match="No space left"):
        engine.save_checkpoint(tmp_path)
    assert engine.load_checkpoint(tmp_path)[0] == str(tmp_path / "global_step0")


def test_what_a_checkpoint_does_not_take(tmp_path: Path) -> None:
    engine = start()
    with pytest.raises(CheckpointError, match=r"client_state\['a'\]\[1\] is a Tensor"):
        engine.save_checkpoint(tmp_path, client_state={"a": [0, torch.ones(1)]})
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "mp_rank_00_model_states.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="written by DeepSpeed"):
        engine.load_checkpoint(tmp_path, tag="theirs")


def test_another_module_is_named(tmp_path: Path) -> None:
    start().save_checkpoint(tmp_path)
    other = Net()
    other.extra = nn.Linear(2, 2)
    engine = start(other)
    with pytest.raises(CheckpointError, match=r"lacks 'extra.bias'.*2 missing, 0 left over"):
        engine.load_checkpoint(tmp_path)
    engine.load_checkpoint(tmp_path, load_module_strict=False, load_optimizer_states=False)
    wide = Net()
    wide.head = nn.Linear(4, 2)
    with pytest.raises(CheckpointError, match=r"'head.bias' is \[1\], the module's is \[2\]|'head.weight' is"):
        start(wide).load_checkpoint(tmp_path)
    model = Net()
    grouped = start(model, parameters=[{"params": model.layers.parameters()}, {"params": model.head.parameters()}])
    advance(grouped, 1)
    grouped.save_checkpoint(tmp_path, tag="two")
    with pytest.raises(CheckpointError, match="of adamw and adamw, this"):
        start().load_checkpoint(tmp_path, tag="two")


def test_the_model_alone(tmp_path: Path) -> None:
    engine = start(bf16={"enabled": True})
    engine.save_16bit_model(tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == dict(engine.named_parameters()).keys()
    assert torch.equal(found["head.weight"], engine.module.head.weight)
    with pytest.raises(ConfigError, match="safetensors"):
        engine.save_16bit_model(tmp_path, "pytorch_model.bin")


# --------------------------------------------------------------------------------------------- what is told
def test_monitors_and_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sinks = {
        "csv_monitor": {"enabled": True, "output_path": str(tmp_path), "job_name": "csv"},
        "tensorboard": {"enabled": True, "output_path": str(tmp_path), "job_name": "events"},
    }
    engine = start(**sinks, steps_per_print=2, wall_clock_breakdown=True)
    losses = advance(engine, 4)
    rows = list(csv.reader((tmp_path / "csv" / "Train_Samples_train_loss.csv").open()))
    assert rows[0] == ["step", "train_loss"] and [row[0] for row in rows[1:]] == ["4", "8", "12", "16"]
    assert [float(row[1]) for row in rows[1:]] == pytest.approx(losses)
    (events,) = (tmp_path / "events").iterdir()
    assert events.read_bytes().count(b"Train/Samples/train_loss") == 4
    lines = [line for line in capsys.readouterr().out.splitlines() if "twofold: step" in line]
    assert len(lines) == 2 and "backward" in lines[0] and f"loss {losses[1]:.4f}" in lines[0]


def test_a_gradient_that_is_not_finite_moves_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    engine = start()
    before = engine.module.head.weight.detach().clone()
    engine.backward(engine(torch.full((4, 4), float("nan"))))
    engine.step()
    assert torch.equal(engine.module.head.weight, before)
    assert (engine.skipped_steps, engine.global_steps, engine.was_step_applied()) == (1, 1, False)
    assert "step 1 skipped: the gradient is not finite" in capsys.readouterr().out
    advance(engine, 1)
    assert engine.was_step_applied()


# --------------------------------------------------------------------------------------------- blocks
def test_blocks() -> None:
    model = Net()
    assert blocks_of(model) == list(model.layers)
    inner = nn.ModuleList([nn.Sequential(nn.Linear(2, 2)), Net()])
    assert blocks_of(nn.Sequential(nn.Linear(2, 2), inner)) == list(inner)  # what is inside of Net stays with it
    assert blocks_of(nn.ModuleList([nn.ModuleList([model.head])])) == [model.head]
    assert blocks_of(nn.Linear(2, 2)) == []
    assert blocks_of(nn.Sequential(nn.ModuleList([nn.Tanh(), nn.Linear(2, 2)])))[0].in_features == 2
    tied = Net()
    tied.layers[1].weight = tied.layers[0].weight
    assert blocks_of(tied) == []
    head = Net()
    head.head.weight = head.layers[1].weight
    assert blocks_of(head) == [head.layers[0]]
