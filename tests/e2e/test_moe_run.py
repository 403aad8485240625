"""A mixture trained from a recipe with every rule: stopped and gone on, it has the bits of a run that never was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_recipe import write_recipe

from twofold.core import ConfigError
from twofold.models import load
from twofold.train import launch
from twofold.train.journal import read_rows
from twofold.train.trainer import Trainer

ERNIE = """architectures = ["Ernie4_5_MoeForCausalLM"]
model_type = "ernie4_5_moe"
moe_num_experts = 4
moe_k = 2
moe_intermediate_size = 16
moe_num_shared_experts = 1
"""
RULES = """
[moe]
balance_loss = 0.01
z_loss = 1e-3
bias_rate = 0.01
capacity = 1.25
noise = "gumbel"
"""
STEPS = {"schedule.steps": 8, "run.save_every": 3, "run.eval_every": 4}


def recipe(folder: Path, architecture: str = ERNIE) -> Path:
    path = write_recipe(folder)
    text = path.read_text().replace('architectures = ["LlamaForCausalLM"]\nmodel_type = "llama"\n', architecture)
    path.write_text(text + RULES)
    return path


def told(run: Path) -> list[dict[str, float]]:
    rows = read_rows(run / "log.jsonl")
    return [{key: row[key] for key in row if key.startswith(("moe_", "loss", "step", "valid"))} for row in rows]


def test_a_run_that_was_broken_off_goes_on_with_the_same_bits(tmp_path: Path, monkeypatch) -> None:
    path = recipe(tmp_path)
    assert launch.run(path, STEPS) == 0
    whole = tmp_path / "run"
    step = Trainer.step

    def breaks(self: Trainer, *given: object) -> object:
        if self.position.step == 5:
            raise KeyboardInterrupt
        return step(self, *given)

    broken = STEPS | {"run.output": str(tmp_path / "broken")}
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", breaks)
        with pytest.raises(KeyboardInterrupt):
            launch.run(path, broken)
    assert launch.run(path, broken) == 0
    for name in ("model/model.safetensors", "checkpoints/step-00000008/model.safetensors"):
        assert (whole / name).read_bytes() == (tmp_path / "broken" / name).read_bytes()
    assert told(whole) == told(tmp_path / "broken")
    last = [row for row in told(whole) if "moe_busiest" in row][-1]
    assert last.keys() >= {"moe_busiest", "moe_dropped", "moe_balance", "moe_z"}
    assert 0.25 <= last["moe_busiest"] <= 0.5 and 0.0 <= last["moe_dropped"] < 0.5
    bias = torch.stack([layer.choice.bias for layer in load(whole / "model").layers[1:]])
    assert 0.0 < float(bias.abs().max()) <= 0.0801 and bias.dtype == torch.float32


def test_biases_are_refused_before_anything_is_trained(tmp_path: Path) -> None:
    mixtral = ERNIE.replace("Ernie4_5_Moe", "Mixtral").replace("ernie4_5_moe", "mixtral").replace("moe_", "#")
    with pytest.raises(ConfigError, match="checkpoints of MixtralForCausalLM have no bias"):
        launch.run(recipe(tmp_path, mixtral), STEPS)
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))
