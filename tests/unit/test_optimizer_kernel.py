"""AdamW and the gradient norm over many tensors: torch's numbers, whichever implementation serves."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from twofold.kernels.optimizer import PIECE, Shard, adamw, add_squares, square_sums

SIZES = ((), (0,), (1,), (15,), (16, 3), (16384,), (16385,), (3, 20_000))


@pytest.fixture(autouse=True, params=["serving", "reference"])
def implementation(request):
    for op in (adamw, square_sums):
        op.use("reference" if request.param == "reference" else None)
    yield
    for op in (adamw, square_sums):
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
            results.append([*run(numbers(0), 2, 1.0), square_sums(numbers(7))])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def squares(*groups: list[tuple[str, Tensor]]) -> dict[str, float]:
    sums = {name: 0.0 for group in groups for name, _ in group}
    for group in groups:
        add_squares(sums, group)
    return sums


def test_squares_are_summed_by_name_and_spoiled_alone() -> None:
    grads = [(str(place), grad) for place, grad in enumerate(numbers(3))]
    for name, found in squares(grads).items():
        assert found == pytest.approx(float(grads[int(name)][1].double().square().sum()), rel=1e-12)
    assert squares() == {} and squares([("a", torch.full((3,), 1e30))]) == {"a": pytest.approx(3e60)}
    for bad in (math.nan, math.inf):
        grads[-1][1][2, 19_999] = bad
        assert [name for name, found in squares(grads).items() if not math.isfinite(found)] == [grads[-1][0]]


def test_squares_of_gradients_that_are_cut_have_the_bits_of_the_whole() -> None:
    a, b, c = torch.randn(5, PIECE), torch.randn(3 * PIECE + 5), torch.randn(7)
    whole = squares([("a", a), ("b", b), ("c", c)])
    first, rest = [("a", a.view(-1)[: 2 * PIECE])], [("a", a.view(-1)[2 * PIECE :]), ("b", b[:PIECE])]
    assert squares(first, rest, [("b", b[PIECE:]), ("c", c)]) == whole


def test_tensors_that_are_not_contiguous_are_updated_too() -> None:
    wide = torch.randn(6, 8)
    weight, plain, grad = wide[:, ::2], wide[:, ::2].clone(), torch.randn(6, 4)
    for w in (weight, plain):
        adamw([Shard(w, grad, (torch.zeros(6, 4), torch.zeros(6, 4)), 1, 0.0)], rate=0.1, betas=(0.9, 0.99), eps=1e-8)
    torch.testing.assert_close(weight, plain)
