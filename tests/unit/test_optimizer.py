"""AdamW over masters: groups, clipping, bf16, and a state that goes round."""

import pytest
import torch
from torch import nn

from twofold.core import CheckpointError
from twofold.train.config import OptimizerConfig
from twofold.train.optimizer import Optimizer, decay_groups


class Small(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(4, 3, dtype=dtype))
        self.scale = nn.Parameter(torch.ones(3, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(3, dtype=dtype))


def give_gradients(model: Small, size: float = 1.0) -> None:
    torch.manual_seed(5)
    for weight in model.parameters():
        weight.grad = torch.randn(weight.shape).to(weight.dtype) * size


def test_norms_and_biases_do_not_decay() -> None:
    decay, keep = decay_groups(Small().named_parameters())
    assert (decay, keep) == (["matrix"], ["scale", "bias"])


def test_a_step_is_torchs_adamw() -> None:
    ours, theirs = Small(), Small()
    theirs.load_state_dict(ours.state_dict())
    optimizer = Optimizer(ours, OptimizerConfig(lr=0.1, weight_decay=0.3, clip=0.5))
    truth = torch.optim.AdamW(
        [
            {"params": [theirs.matrix], "weight_decay": 0.3},
            {"params": [theirs.scale, theirs.bias], "weight_decay": 0.0},
        ],
        lr=0.1,
        betas=(0.9, 0.95),
    )
    for rate in (0.1, 0.05, 0.2):
        give_gradients(ours)
        give_gradients(theirs)
        norm = optimizer.clip()
        assert norm == pytest.approx(float(nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)))
        optimizer.step(rate)
        for group in truth.param_groups:
            group["lr"] = rate
        truth.step()
        optimizer.zero()
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b)


def test_small_gradients_are_not_scaled_up_and_bad_ones_are_told() -> None:
    model = Small()
    optimizer = Optimizer(model, OptimizerConfig(clip=100.0))
    give_gradients(model)
    before = model.matrix.grad.clone()
    optimizer.clip()
    assert torch.equal(model.matrix.grad, before)
    model.bias.grad[0] = torch.inf
    assert not torch.isfinite(torch.tensor(optimizer.clip()))


def test_bf16_gradients_add_up_in_fp32_and_tiny_steps_are_not_lost() -> None:
    model = Small(torch.bfloat16)
    optimizer = Optimizer(model, OptimizerConfig(weight_decay=0.0))
    total = torch.zeros(4, 3)
    for _ in range(3):
        give_gradients(model, 1e-3)
        total += model.matrix.grad.float()
        optimizer.collect()
        assert model.matrix.grad is None
    assert torch.equal(optimizer.masters["matrix"].grad, total)
    start = model.matrix.detach().float().clone()
    for _ in range(40):  # each step alone is less than bf16 can show
        optimizer.masters["matrix"].grad = torch.ones(4, 3)
        optimizer.step(1e-4)
    assert torch.all(optimizer.masters["matrix"] < start)
    assert torch.equal(model.matrix, optimizer.masters["matrix"].bfloat16())
    assert float((start - model.matrix.detach().float()).mean()) == pytest.approx(40e-4, rel=0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_goes_round_bit_for_bit(dtype: torch.dtype) -> None:
    def steps(optimizer: Optimizer, model: Small, count: int) -> None:
        for _ in range(count):
            give_gradients(model)
            optimizer.collect()
            optimizer.step(0.01)
            optimizer.zero()

    first = Small(dtype)
    one = Optimizer(first, OptimizerConfig())
    steps(one, first, 3)
    second = Small(dtype)
    second.load_state_dict(first.state_dict())
    two = Optimizer(second, OptimizerConfig())
    two.load({name: tensor.clone() for name, tensor in one.state().items()})
    steps(one, first, 2)
    steps(two, second, 2)
    for a, b in zip(first.parameters(), second.parameters()):
        assert torch.equal(a, b)
    for name, tensor in one.state().items():
        assert torch.equal(tensor, two.state()[name]), name


def test_a_missing_misshapen_or_left_over_tensor_is_named() -> None:
    model = Small()
    optimizer = Optimizer(model, OptimizerConfig())
    give_gradients(model)
    optimizer.step(0.1)
    good = optimizer.state()
    missing = {k: v for k, v in good.items() if k != "exp_avg.matrix"}
    with pytest.raises(CheckpointError, match=r"lacks 'exp_avg\.matrix'"):
        Optimizer(Small(), OptimizerConfig()).load(missing)
    with pytest.raises(CheckpointError, match=r"'exp_avg\.matrix' is \[2\], the model's is \[4, 3\]"):
        Optimizer(Small(), OptimizerConfig()).load(good | {"exp_avg.matrix": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"does not: stranger"):
        Optimizer(Small(), OptimizerConfig()).load(good | {"stranger": torch.zeros(2)})
