"""Numbers that are not finite: where they are laid, and how an fp16 run goes on; gradients in fp16 against fp32."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_trainer import Numbers, make_trainer
from tiny import SPECS, decoder

from twofold.models.decoder import Decoder
from twofold.models.packed import PackedContext
from twofold.train import loss as losses
from twofold.train.config import OptimizerConfig
from twofold.train.init import init_weights
from twofold.train.objective import Tokens
from twofold.train.optimizer import Optimizer
from twofold.train.recompute import recompute_layers
from twofold.train.scaler import LossScaleConfig, LossScaler
from twofold.train.trainer import Trainer


def spoil(trainer: Trainer, name: str) -> None:
    trainer.decoder.get_parameter(name).data.view(-1)[3] = math.nan


@pytest.mark.parametrize("part", ["layers.1.down", "layers.0.qkv", "layers.1.norm2", "layers.0.experts.down"])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_loss_that_is_not_finite_is_laid_at_the_module_where_it_began(
    tmp_path: Path, part: str, recompute: bool
) -> None:
    model = decoder(SPECS["moe" if "experts" in part else "llama"])
    if recompute:
        recompute_layers(model)
    trainer = make_trainer(model, tmp_path, Numbers((40, 30), vocab=131), micro=40)
    trainer.position = replace(trainer.position, step=7)
    spoil(trainer, f"{part}.weight")
    done = trainer.step(trainer.data.train.batch(7))
    called = part.removesuffix(".down") if "experts" in part else part
    assert done.skipped == f"the loss is not finite, first in the output of {called} (batch 7)"
    assert not done.overflow


def test_a_loss_that_is_not_finite_by_itself_is_told_from_one_of_a_module(tmp_path: Path) -> None:
    trainer = make_trainer(decoder(SPECS["llama"]), tmp_path, Numbers((40,), vocab=131))
    done = trainer.step(trainer.data.train.batch(0), Tokens(lambda *given: losses.next_token(*given) * math.nan))
    assert done.skipped == "the loss is not finite, though every module's output is (batch 0)"


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("llama", "head"),
        ("llama", "layers.1.down"),
        ("llama", "layers.1.norm2"),
        ("llama", "layers.1.out"),
        ("llama", "layers.0.qkv"),
        ("llama", "embed"),
        ("gemma2", "layers.1.norm4"),
        ("gemma2", "layers.0.norm1"),
        ("gemma2", "embed"),  # tied: as a table it is the last that the backward pass comes to
        ("moe", "layers.0.experts.down"),
    ],
)
def test_a_gradient_that_is_not_finite_is_laid_at_the_first_module_of_the_backward_pass(
    tmp_path: Path, name: str, where: str
) -> None:
    """The gradient of one weight overflows, and so do those that the backward pass comes to later."""
    model = decoder(SPECS[name])
    trainer = make_trainer(model, tmp_path, Numbers((40,), vocab=131))
    collect, backwards = trainer.optimizer.collect, BACKWARDS[name]

    def poisoned() -> None:
        collect()
        for module in backwards[backwards.index(where) :]:
            for weight in model.get_submodule(module).parameters(recurse=False):
                weight.grad.view(-1)[0] = math.inf

    trainer.optimizer.collect = poisoned  # type: ignore[method-assign]
    done = trainer.step(trainer.data.train.batch(0))
    assert done.skipped == f"the gradient is not finite, first in {where} (batch 0)"


def _layer(index: int, *parts: str) -> list[str]:
    return [f"layers.{index}.{part}" for part in parts]


PRE = ("down", "gate_up", "norm2", "out", "qkv", "norm1")
SANDWICH = ("norm4", "down", "gate_up", "norm3", "norm2", "out", "qkv", "norm1")
MIXTURE = ("experts.down", "router", "norm2", "out", "qkv", "norm1")
BACKWARDS = {
    "llama": ["head", "norm", *_layer(1, *PRE), *_layer(0, *PRE), "embed"],
    "gemma2": ["norm", *_layer(1, *SANDWICH), *_layer(0, *SANDWICH), "embed"],
    "moe": ["norm", *_layer(1, *PRE), *_layer(0, *MIXTURE), "embed"],
}
"""Modules in the order in which the backward pass comes to their weights."""


def test_fp16_gradients_overflow_are_scaled_back_and_train(tmp_path: Path) -> None:
    model = Decoder(SPECS["llama"], dtype=torch.float16)
    init_weights(model, 7)
    trainer = make_trainer(model, tmp_path, Numbers((60, 60), vocab=131), micro=60, steps=14)
    trainer.scaler = LossScaler(LossScaleConfig(initial_scale_power=26, hysteresis=1))
    assert trainer.fit() == 0
    skipped = [row["skipped"] for row in trainer.journal.rows if "skipped" in row]
    assert skipped[0].startswith("the gradient is not finite, first in head")
    assert skipped[0].endswith(" (batch 0), at loss scale 6.71089e+07, from here 3.35544e+07")
    assert trainer.position.skips_in_row == 0 and trainer.position.skipped == len(skipped) >= 1
    scale = 2.0 ** (26 - len(skipped))
    logged = [row for row in trainer.journal.rows if "loss" in row]
    assert logged[-1]["loss_scale"] == scale == trainer.scaler.scale
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]) for row in logged)


def test_fp16_gradients_are_those_of_fp32_to_their_rounding(tmp_path: Path) -> None:
    grads = []
    for dtype, scale in ((torch.float32, 1.0), (torch.float16, 1024.0)):
        model = Decoder(SPECS["llama"])
        init_weights(model, 7)
        model = model.half().to(dtype)  # the same weights, exactly
        optimizer = Optimizer(model.named_parameters(), OptimizerConfig())
        batch = Numbers((60, 60), vocab=131).batch(0)
        hidden_TD = model(batch.ids_T, PackedContext(batch.lengths))
        losses.backward(model, hidden_TD, batch.targets_T, 120 / scale, 131)
        optimizer.collect()
        grads.append({name: optimizer.gradient(name) / scale for name, _ in model.named_parameters()})
    for name, right in grads[0].items():
        assert float((grads[1][name] - right).norm()) < 2e-3 * float(right.norm()), name
