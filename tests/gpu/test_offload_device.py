"""ZeRO-Offload where there is a device: its weights and gradients, the host's masters, states and arithmetic."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from twofold.train.config import OptimizerConfig
from twofold.train.offload import Offload
from twofold.train.offload_config import OffloadConfig
from twofold.train.optimizer import Optimizer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("places", [{"optimizer": "host"}, {"optimizer": "disk", "gradients": "disk"}])
def test_the_host_updates_what_the_device_trains(places, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(64, 300), nn.Linear(300, 7)).to("cuda", dtype) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    offloads = Offload(), Offload(OffloadConfig(**places), tmp_path)
    config = OptimizerConfig(lr=0.01, clip=0.5)
    optimizers = [Optimizer(m.named_parameters(), config, offload=o) for m, o in zip(models, offloads)]
    for step in range(4):
        x = torch.randn(32, 64, device="cuda", dtype=dtype, generator=torch.Generator("cuda").manual_seed(step))
        for model, optimizer in zip(models, optimizers):
            model(x).float().square().sum().backward()
            optimizer.collect()
            optimizer.clip()
            optimizer.step(0.01)
            optimizer.zero()
    for one, other in zip(models[0].parameters(), models[1].parameters()):
        torch.testing.assert_close(one, other, atol=2e-3 if dtype == torch.bfloat16 else 1e-5, rtol=1e-2)
    assert all(x.device.type == "cpu" for x in optimizers[1].state().values())
