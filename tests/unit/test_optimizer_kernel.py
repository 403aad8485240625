"""AdamW and the gradient norm over many tensors: torch's numbers, whichever implementation serves."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from twofold.kernels.optimizer import Shard, adamw, gradient_norm

SIZES = ((), (0,), (1,), (15,), (16, 3), (16384,), (16385,), (3, 20_000))


@pytest.fixture(autouse=True, params=["serving", "reference"])
def implementation(request):
    for op in (adamw, gradient_norm):
        op.use("reference" if request.param == "reference" else None)
    yield
    for op in (adamw, gradient_norm):
        op.use(None)


def numbers(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator) for size in SIZES]


def run(weights: list[Tensor], updates: int, scale: float) -> list[Tensor]:
    moments = [(torch.zeros_like(w), torch.zeros_like(w)) for w in weights]
    for update in range(1, updates + 1):
        shards = [
            Shard(w, grad, (mean, square), update, 0.1 * (place % 2))
            for place, (w, grad, (mean, square)) in enumerate(zip(weights, numbers(update), moments))
        ]
        adamw(shards, rate=0.01 * update, betas=(0.9, 0.95), eps=1e-8, scale=scale)
    return weights


def test_it_is_torchs_adamw() -> None:
    ours = run(numbers(0), 4, 0.5)
    theirs = [torch.nn.Parameter(x.double()) for x in numbers(0)]
    groups = [{"params": [p], "weight_decay": 0.1 * (place % 2)} for place, p in enumerate(theirs)]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    for update in range(1, 5):
        for p, grad in zip(theirs, numbers(update)):
            p.grad = 0.5 * grad.double()
        for group in adam.param_groups:
            group["lr"] = 0.01 * update
        adam.step()
    for mine, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.double(), right.detach(), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("threads", [2, 4])
def test_threads_change_no_bit(threads: int) -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            results.append([*run(numbers(0), 2, 1.0), torch.tensor(gradient_norm(numbers(7)))])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_the_norm_is_that_of_all_together() -> None:
    grads = numbers(3)
    assert gradient_norm(grads) == pytest.approx(
        float(torch.cat([g.flatten().double() for g in grads]).norm()), rel=1e-9
    )
    assert gradient_norm([]) == 0.0 and gradient_norm([torch.full((3,), 1e30)]) == pytest.approx(3**0.5 * 1e30)
    for bad in (math.nan, math.inf):
        grads[-1][2, 19_999] = bad
        assert not math.isfinite(gradient_norm(grads))


def test_tensors_that_are_not_contiguous_are_updated_too() -> None:
    wide = torch.randn(6, 8)
    weight, plain, grad = wide[:, ::2], wide[:, ::2].clone(), torch.randn(6, 4)
    for w in (weight, plain):
        adamw([Shard(w, grad, (torch.zeros(6, 4), torch.zeros(6, 4)), 1, 0.0)], rate=0.1, betas=(0.9, 0.99), eps=1e-8)
    torch.testing.assert_close(weight, plain)
