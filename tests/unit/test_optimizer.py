"""Masters and what a rule keeps: groups, clipping, 16-bit weights, slices, and a state that goes round."""

from collections.abc import Mapping

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from twofold.core import CheckpointError
from twofold.train.config import RULES, OptimizerConfig
from twofold.train.offload import Offload
from twofold.train.offload_config import OffloadConfig
from twofold.train.optimizer import Optimizer, decay_groups


class Small(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(4, 3, dtype=dtype))
        self.scale = nn.Parameter(torch.ones(3, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(3, dtype=dtype))


MATRICES = {"matrix": ((slice(0, 2),), (slice(2, 4),))}


def make(model: nn.Module, **settings) -> Optimizer:
    return Optimizer(model.named_parameters(), OptimizerConfig(**settings), matrices=MATRICES)


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
    optimizer = make(ours, lr=0.1, weight_decay=0.3, clip=0.5)
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
    optimizer = make(model, clip=100.0)
    give_gradients(model)
    before = model.matrix.grad.clone()
    optimizer.clip()
    assert torch.equal(model.matrix.grad, before)
    model.bias.grad[0] = torch.inf
    assert not torch.isfinite(torch.tensor(optimizer.clip()))


def test_bf16_gradients_add_up_in_fp32_and_tiny_steps_are_not_lost() -> None:
    model = Small(torch.bfloat16)
    optimizer = make(model, weight_decay=0.0)
    total = torch.zeros(4, 3)
    for _ in range(3):
        give_gradients(model, 1e-3)
        total += model.matrix.grad.float()
        optimizer.collect()
        assert model.matrix.grad is None
    assert torch.equal(optimizer.gradient("matrix"), total)
    optimizer.zero()
    start = model.matrix.detach().float().clone()
    for _ in range(40):  # each step alone is less than bf16 can show
        model.matrix.grad = torch.ones(4, 3, dtype=torch.bfloat16)
        optimizer.collect()
        optimizer.step(1e-4)
        optimizer.zero()
    assert torch.all(optimizer.master("matrix") < start)
    assert torch.equal(model.matrix, optimizer.master("matrix").bfloat16())
    assert float((start - model.matrix.detach().float()).mean()) == pytest.approx(40e-4, rel=0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", RULES)
def test_state_goes_round_bit_for_bit(rule: str, dtype: torch.dtype) -> None:
    def steps(optimizer: Optimizer, model: Small, count: int) -> None:
        for _ in range(count):
            give_gradients(model)
            optimizer.collect()
            optimizer.step(0.01)
            optimizer.zero()

    first = Small(dtype)
    one = make(first, name=rule)
    steps(one, first, 3)
    second = Small(dtype)
    second.load_state_dict(first.state_dict())
    two = make(second, name=rule)
    two.load({name: tensor.clone() for name, tensor in one.state().items()})
    steps(one, first, 2)
    steps(two, second, 2)
    for a, b in zip(first.parameters(), second.parameters()):
        assert torch.equal(a, b)
    for name, tensor in one.state().items():
        assert torch.equal(tensor, two.state()[name]), name
    assert float(one.state()["step.bias"]) == 5.0


def test_a_missing_misshapen_or_left_over_tensor_is_named() -> None:
    model = Small()
    optimizer = make(model)
    give_gradients(model)
    optimizer.step(0.1)
    good = optimizer.state()
    missing = {k: v for k, v in good.items() if k != "exp_avg.matrix"}
    with pytest.raises(CheckpointError, match=r"lacks 'exp_avg\.matrix'"):
        make(Small()).load(missing)
    with pytest.raises(CheckpointError, match=r"'exp_avg\.matrix' is \[2\], the model's is \[4, 3\]"):
        make(Small()).load(good | {"exp_avg.matrix": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"does not: stranger"):
        make(Small()).load(good | {"stranger": torch.zeros(2)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_scaled_loss_gives_the_step_of_one_that_is_not(dtype: torch.dtype) -> None:
    results = []
    for scale in (1.0, 1024.0):
        torch.manual_seed(1)
        model = Small(dtype)
        optimizer = make(model, clip=0.5)
        give_gradients(model, scale)
        optimizer.collect()
        norm = optimizer.clip(scale)
        optimizer.step(0.1)
        results.append((norm, optimizer.master("matrix").clone()))
    (norm, weight), (scaled_norm, scaled_weight) = results
    assert scaled_norm == pytest.approx(norm, rel=1e-6)
    torch.testing.assert_close(scaled_weight, weight)


def test_the_norm_may_be_asked_of_all_ranks() -> None:
    model, asked = Small(), []

    def norm(squares: Mapping[str, float]) -> float:
        asked.append(sorted(squares))
        return 4.0

    optimizer = Optimizer(model.named_parameters(), OptimizerConfig(name="sgd", clip=1.0), norm=norm)
    give_gradients(model)
    before, grad = model.matrix.detach().clone(), model.matrix.grad.clone()
    assert optimizer.clip() == 4.0 and asked == [["bias", "matrix", "scale"]]
    optimizer.step(1.0)
    torch.testing.assert_close(model.matrix.detach(), before - grad / 4.0)
    optimizer.zero()
    assert optimizer.clip(2.0) == 2.0 and asked[1] == []  # a rank without gradients asks too


def test_what_a_rule_keeps_lies_where_the_recipe_says() -> None:
    model, offload = Small(torch.bfloat16), Offload(OffloadConfig(optimizer="host"))
    optimizer = Optimizer(model.named_parameters(), OptimizerConfig(name="lion"), offload=offload)
    held = offload._pools["host"].tensors
    assert held.keys() == {"master.matrix", "master.scale", "master.bias"}
    give_gradients(model)
    optimizer.collect()
    optimizer.step(0.1)
    assert {"exp_avg.matrix", "exp_avg.scale", "exp_avg.bias"} <= held.keys()
    assert all(tensor is held[name] for name, tensor in optimizer.state().items() if not name.startswith("step."))
    assert float(held["exp_avg.matrix"].abs().sum()) > 0


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("rule", RULES)
def test_dtensors_are_updated_by_their_slices(rule: str, one_rank: None) -> None:
    plain, cut = Small(), Small()
    cut.load_state_dict(plain.state_dict())
    fully_shard(cut)
    one, two = make(plain, name=rule), make(cut, name=rule)
    for _ in range(3):
        for model, optimizer in ((plain, one), (cut, two)):
            give_gradients(plain)
            if model is cut:
                for weight, like in zip(cut.parameters(), plain.parameters(), strict=True):
                    weight.grad = DTensor.from_local(like.grad, weight.device_mesh, weight.placements)
            optimizer.clip()
            optimizer.step(0.01)
            optimizer.zero()
    for a, b in zip(plain.parameters(), cut.parameters(), strict=True):
        assert isinstance(b, DTensor) and torch.equal(a, b.full_tensor())
    state = two.state()
    assert not any(isinstance(tensor, DTensor) for tensor in state.values())
    again = make(cut, name=rule)
    again.load({name: tensor.clone() for name, tensor in state.items()})
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state().items())
