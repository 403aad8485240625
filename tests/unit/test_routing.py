"""The rules of a mixture in training, each against its definition written out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from twofold.core import ConfigError
from twofold.data.pack import NOBODY, Batch
from twofold.kernels.moe import experts, route
from twofold.train import routing
from twofold.train.axes import pad
from twofold.train.moe_config import MoeConfig
from twofold.train.share import share


# ------------------------------------------------------------------------------------------------------------- noise
def test_a_tokens_numbers_are_a_function_of_its_place() -> None:
    places = torch.arange(50)
    whole = routing.uniform(77, places, 9)
    assert torch.equal(torch.cat([routing.uniform(77, part, 9) for part in places.split((13, 1, 36))]), whole)
    assert torch.equal(routing.uniform(77, places.flip(0), 9), whole.flip(0))
    assert torch.equal(routing.uniform(77, places, 4), whole[:, :4])
    assert not torch.equal(routing.uniform(78, places, 9), whole)


def test_the_numbers_are_even_and_strangers_to_one_another() -> None:
    places = torch.arange(4000)
    u = routing.uniform(routing.key_of(0, 3, 1), places, 16).double()
    assert 0.0 < float(u.min()) < 1e-3 and 1.0 - 1e-3 < float(u.max()) < 1.0
    assert abs(float(u.mean()) - 0.5) < 0.005 and abs(float(u.var()) - 1 / 12) < 0.002
    counts = torch.histc(u, bins=50, min=0, max=1)
    assert float(((counts - 1280) ** 2 / 1280).sum()) < 90  # chi-squared, 49 degrees of freedom
    centred = u - 0.5
    for other in (centred.roll(1, 0), centred.roll(1, 1), routing.uniform(routing.key_of(0, 4, 1), places, 16) - 0.5):
        assert abs(float((centred * other).mean())) * 12 < 0.015


def test_jitter_multiplies_within_its_width() -> None:
    x, places = torch.randn(300, 8), torch.arange(300)
    ratio = routing.jitter(x, 5, places, 0.01) / x
    assert 0.99 <= float(ratio.min()) < 0.9905 and 1.0095 < float(ratio.max()) <= 1.0101
    assert torch.equal(routing.jitter(x, 5, places, 0.01)[40:], routing.jitter(x[40:], 5, places[40:], 0.01))


def test_gumbel_draws_experts_by_their_probabilities() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0]).expand(40_000, 4)
    drawn = routing.gumbel(logits, 9, torch.arange(40_000)).argmax(-1)
    share = torch.bincount(drawn, minlength=4) / len(drawn)
    torch.testing.assert_close(share, logits[0].softmax(-1), atol=0.01, rtol=0)


def test_every_token_of_a_batch_has_one_place_whoever_has_it() -> None:
    lengths = (9, 1, 14, 3, 20, 6)
    ids = torch.arange(sum(lengths))
    whole = Batch(ids_T=ids, targets_T=ids, lengths=lengths)
    for ranks, tokens in ((1, None), (1, 21), (3, None), (3, 9), (9, None)):
        places = torch.cat([part.places() for rank in range(ranks) for part in share(whole, ranks, rank, tokens)])
        assert places[places != NOBODY].tolist() == ids.tolist()
    padded = pad(share(whole, 3, 1, None)[0], 8)
    real = padded.places() != NOBODY
    assert len(real) % 8 == 0 and 0 < int(real.sum()) < len(real)
    assert torch.equal(padded.places()[real], padded.ids_T[real])


# ---------------------------------------------------------------------------------------------------------- capacity
def test_capacity_is_a_multiple_of_the_even_share_and_never_less_than_asked() -> None:
    assert routing.capacity_of(pairs=100, experts=8, factor=1.25, least=4) == 16  # 15.6 rounded up
    assert routing.capacity_of(pairs=16, experts=8, factor=1.0, least=4) == 4
    assert routing.capacity_of(pairs=16, experts=8, factor=1.0, least=1) == 2


def test_a_token_that_is_nobodys_takes_no_room() -> None:
    chosen = torch.tensor([[0, -1], [-1, -1], [0, 1], [0, 1]])
    weights = torch.tensor([[0.1, 0.9], [0.9, 0.9], [0.2, 0.8], [0.3, 0.7]])
    assert routing.within(weights, chosen, 2, 2, "position").tolist() == [[1, 0], [0, 0], [1, 1], [0, 1]]
    assert routing.within(weights, chosen, 2, 2, "probs").tolist() == [[0, 0], [0, 0], [1, 1], [1, 1]]
    assert routing.counts_of(chosen, 3).tolist() == [3, 2, 0]


def queued(weights: Tensor, chosen: Tensor, capacity: int, by: str) -> Tensor:
    """The definition, expert by expert."""
    fits = torch.zeros_like(chosen, dtype=torch.bool)
    for expert in chosen.unique().tolist():
        pairs = (chosen == expert).nonzero().tolist()
        if by == "probs":
            pairs.sort(key=lambda pair: -float(weights[pair[0], pair[1]]))
        for t, c in pairs[:capacity]:
            fits[t, c] = True
    return fits


@pytest.mark.parametrize("by", ["probs", "position"])
@pytest.mark.parametrize("capacity", [1, 4, 11, 200])
def test_a_full_expert_drops_the_least_or_the_last(by: str, capacity: int) -> None:
    logits = torch.randn(60, 5) + torch.tensor([2.0, 0.0, 0.0, 0.0, -1.0])
    logits[:20] = logits[:20].round()  # equal weights: the earlier token is before
    weights, chosen = route(logits, 2, True)
    fits = routing.within(weights, chosen, 5, capacity, by)
    assert torch.equal(fits, queued(weights, chosen, capacity, by))
    assert int(fits.sum()) == sum(min(capacity, n) for n in routing.counts_of(chosen, 5).tolist())


def test_dropped_pairs_are_not_computed() -> None:
    x, up, down = torch.randn(4, 6), torch.randn(3, 10, 6), torch.randn(3, 6, 5)
    up[2] = torch.nan  # whoever looks at this expert shows it
    weights = torch.tensor([[0.7, 0.3], [0.6, 0.4], [0.5, 0.5], [1.0, 0.0]])
    chosen = torch.tensor([[0, -1], [-1, 1], [1, 0], [-1, -1]])
    for way in (experts, experts.reference):
        out = way(x, up, down, weights, chosen, "silu")
        assert torch.isfinite(out).all() and torch.equal(out[3], torch.zeros(6))
        alone = way(x[:1], up, down, weights[:1, :1], chosen[:1, :1], "silu")
        torch.testing.assert_close(out[:1], alone)


def test_dropped_pairs_have_no_gradient() -> None:
    x, up, down = (torch.randn(*shape, requires_grad=True) for shape in ((5, 6), (3, 10, 6), (3, 6, 5)))
    weights = torch.rand(5, 2, requires_grad=True)
    chosen = torch.tensor([[0, -1], [-1, 1], [1, 0], [-1, -1], [0, 1]])
    for way in (experts, experts.reference):
        grads = torch.autograd.grad(way(x, up, down, weights, chosen, "silu").square().sum(), (x, up, down, weights))
        assert float(grads[0][3].abs().max()) == 0 and float(grads[0][0].abs().max()) > 0
        assert float(grads[1][2].abs().max()) == 0 and float(grads[2][2].abs().max()) == 0
        assert torch.equal(grads[3] == 0, chosen < 0)


# ----------------------------------------------------------------------------------------------------------- balance
def test_counts() -> None:
    assert routing.counts_of(torch.tensor([[0, 3], [3, 1], [3, 0]]), 5).tolist() == [2, 1, 0, 3, 0]


def test_the_balance_loss_by_hand() -> None:
    """Two tokens, three experts, f = (3/4, 1/4, 0)."""
    p = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.2, 0.2]], dtype=torch.float64)
    loss = routing.balance_loss(p.log(), torch.tensor([3, 1, 0]))
    assert loss.tolist() == pytest.approx([3 * (0.75 * 0.5 + 0.25 * 0.3), 3 * (0.75 * 0.6 + 0.25 * 0.2)])
    even = routing.balance_loss(torch.zeros(7, 4), torch.tensor([2, 2, 2, 2]))
    assert even.tolist() == pytest.approx([1.0] * 7)


def test_the_z_loss_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]], dtype=torch.float64)
    assert routing.z_loss(logits).tolist() == pytest.approx([math.log(2) ** 2, math.log(4) ** 2])


def test_biases_move_towards_the_mean_load() -> None:
    bias = torch.tensor([[0.5, 0.0, -0.25, 0.0]])
    after = routing.moved(bias, torch.tensor([8, 4, 0, 4]), 0.001)
    torch.testing.assert_close(after, torch.tensor([[0.499, 0.0, -0.249, 0.0]]))


def test_a_bias_moves_the_choice_and_no_weight() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    p = logits.softmax(-1)[0]
    bias = torch.tensor([-1.0, 0.0, 0.0, 0.5])
    for way in (route, route.reference):
        weights, chosen = way(logits, 2, False, bias)
        assert chosen.tolist() == [[3, 1]]
        torch.testing.assert_close(weights[0], p[[3, 1]])
        assert way(logits, 2, False, torch.zeros(4))[1].tolist() == [[0, 1]]
        assert way(torch.zeros(1, 20), 4, True, torch.zeros(20))[1].tolist() == [[0, 1, 2, 3]]


# ------------------------------------------------------------------------------------------------------------- carry
def test_a_carried_loss_joins_the_backward_pass_of_another() -> None:
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)

    def parts(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.sin().sum(), (x**3).sum() * 0.1

    main, extra = parts(x)
    (apart,) = torch.autograd.grad(main + 4.0 * extra, x)
    carried = routing.carry(x, parts(x)[1], scale=4.0)
    assert torch.equal(carried, x)
    (together,) = torch.autograd.grad(carried.sin().sum(), x)
    torch.testing.assert_close(together, apart)


# ---------------------------------------------------------------------------------------------------------- settings
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"balance_loss": -1.0}, "moe.balance_loss must be 0 or more"),
        ({"z_loss": -0.1}, "moe.z_loss"),
        ({"bias_rate": -0.1}, "moe.bias_rate"),
        ({"capacity": 0.0}, "moe.capacity must be more than 0, not 0.0; leave it out"),
        ({"min_capacity": 0}, "moe.min_capacity"),
        ({"jitter": 1.0}, "moe.jitter must be more than 0 and less than 1"),
    ],
)
def test_what_cannot_be_is_refused_by_name(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MoeConfig(**change)
