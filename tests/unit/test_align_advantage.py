"""Advantages against numbers worked by hand; what must not change them; rewards that are missing or all alike."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from twofold.align.advantage import (
    discounted_sums,
    gae,
    group_advantage,
    informative,
    overlong_penalty,
    reinforce_baseline,
    rloo,
    shaped_rewards,
    whiten,
)

NAN = float("nan")


def close(found: Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_gae_by_hand() -> None:
    """γ = 0.9, λ = 0.5, so γλ = 0.45; two sequences, of 3 tokens and of 1.

    δ = 0 + 0.9·2 - 1 = 0.8;  0 + 0.9·3 - 2 = 0.7;  1 + 0 - 3 = -2;  and 2 + 0 - 4 = -2
    A = 0.8 + 0.45·(-0.2) = 0.71;  0.7 + 0.45·(-2) = -0.2;  -2;  and -2;  returns are A + V
    """
    owner_R = torch.tensor([0, 0, 0, 1])
    rewards_R, values_R = torch.tensor([0.0, 0.0, 1.0, 2.0]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    advantages_R, returns_R = gae(rewards_R, values_R, owner_R, 0.9, 0.5)
    close(advantages_R, [0.71, -0.2, -2.0, -2.0])
    close(returns_R, [1.71, 1.8, 1.0, 2.0])


def test_what_a_tool_said_is_stepped_over() -> None:
    """The tokens of the example above, with a tool's words between the first and the second, and at the end."""
    owner_R = torch.tensor([0, 0, 0, 0, 0, 1, 1])
    mine_R = torch.tensor([True, False, False, True, True, True, False])
    rewards_R = torch.tensor([0.0, 7.0, 7.0, 0.0, 1.0, 2.0, 7.0])
    values_R = torch.tensor([1.0, 9.0, 9.0, 2.0, 3.0, 4.0, 9.0])
    advantages_R, returns_R = gae(rewards_R, values_R, owner_R, 0.9, 0.5, mine_R)
    close(advantages_R, [0.71, 0.0, 0.0, -0.2, -2.0, -2.0, 0.0])
    close(returns_R, [1.71, 0.0, 0.0, 1.8, 1.0, 2.0, 0.0])


@settings(max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    gamma=st.floats(0, 1),
    lam=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_gae_is_the_sum_of_its_definition(lengths: list[int], gamma: float, lam: float, seed: int) -> None:
    """The double loop of the paper's equation 16, sequence by sequence."""
    generator = torch.Generator().manual_seed(seed)
    owner_R = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    rewards_R, values_R = torch.randn(2, len(owner_R), generator=generator)
    expected = []
    for s in range(len(lengths)):
        r, v = rewards_R[owner_R == s].tolist(), [*values_R[owner_R == s].tolist(), 0.0]
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(len(r))]
        expected += [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, len(r))) for t in range(len(r))]
    close(gae(rewards_R, values_R, owner_R, gamma, lam)[0], expected)


def test_with_lambda_one_the_returns_are_those_of_the_rewards() -> None:
    owner_R = torch.tensor([0, 0, 1, 1, 1])
    rewards_R, values_R = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), torch.tensor([9.0, 8.0, 7.0, 6.0, 5.0])
    # 1 + ½·2 = 2, 2;  3 + ½·(4 + ½·5) = 6.25, 4 + ½·5 = 6.5, 5
    close(discounted_sums(rewards_R, owner_R, 0.5), [2.0, 2.0, 6.25, 6.5, 5.0])
    close(gae(rewards_R, values_R, owner_R, 0.5, 1.0)[1], [2.0, 2.0, 6.25, 6.5, 5.0])


def test_no_tokens_have_no_advantages() -> None:
    nothing, nobody = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    assert gae(nothing, nothing, nobody, 0.9, 0.9)[0].shape == (0,)
    assert group_advantage(nothing, nobody).shape == (0,)


def test_the_score_falls_on_the_last_own_token_and_each_pays_its_kl() -> None:
    owner_R = torch.tensor([0, 0, 0, 2, 2])
    mine_R = torch.tensor([True, True, False, True, True])
    kl_R = torch.tensor([1.0, 2.0, 50.0, 3.0, 4.0])
    rewards_R = shaped_rewards(torch.tensor([10.0, 77.0, 20.0]), owner_R, kl_R, 0.1, mine_R)
    close(rewards_R, [-0.1, 10.0 - 0.2, 0.0, -0.3, 20.0 - 0.4])


def test_whitening_by_hand() -> None:
    """1, 2, 6: mean 3, unbiased variance (4 + 1 + 9) / 2 = 7; the masked 100 is counted nowhere."""
    x_R, mask_R = torch.tensor([1.0, 100.0, 2.0, 6.0]), torch.tensor([True, False, True, True])
    root = math.sqrt(7)
    close(whiten(x_R, mask_R), [-2 / root, 0.0, -1 / root, 3 / root])
    close(whiten(x_R, mask_R, shift=False), [3 - 2 / root, 0.0, 3 - 1 / root, 3 + 3 / root])
    close(whiten(torch.tensor([5.0])), [0.0])
    close(whiten(torch.tensor([5.0, 5.0])), [0.0, 0.0])


GROUP_N = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
REWARDS_N = torch.tensor([1.0, 0.0, 0.0, 1.0, 3.0, 0.0, 0.0, 1.0])


def test_group_advantages_by_hand() -> None:
    """Group 0: mean ½, std √(4·¼ / 3) = 0.57735. Group 1: mean 1, std √((4 + 1 + 1 + 0) / 3) = √2.

    All: mean ¾, squares 1 + 1 + 9 + 1 = 12, std √((12 - 8·9/16) / 7) = √(7.5 / 7) = 1.035098.
    """
    centred = [0.5, -0.5, -0.5, 0.5, 2.0, -1.0, -1.0, 0.0]
    std = [0.5773503] * 4 + [math.sqrt(2)] * 4
    close(group_advantage(REWARDS_N, GROUP_N, scale="none"), centred)
    close(group_advantage(REWARDS_N, GROUP_N), [c / s for c, s in zip(centred, std)])
    close(group_advantage(REWARDS_N, GROUP_N, scale="batch"), [c / 1.0350983 for c in centred])
    close(group_advantage(REWARDS_N, GROUP_N, eps=1.0), [c / (s + 1) for c, s in zip(centred, std)])


def test_leave_one_out_by_hand() -> None:
    """1 against (0 + 0 + 1) / 3, 0 against ⅔, ...; 3 against ⅓, 0 against 4/3, 1 against 1."""
    close(rloo(REWARDS_N, GROUP_N), [2 / 3, -2 / 3, -2 / 3, 2 / 3, 8 / 3, -4 / 3, -4 / 3, 0.0])


def test_missing_rewards_are_counted_nowhere() -> None:
    rewards_N = torch.tensor([1.0, NAN, 0.0, 1.0, NAN, NAN, 4.0, NAN])
    # group 0 is 1, 0, 1: mean ⅔, std √((1/9 + 4/9 + 1/9) / 2) = 0.57735; group 1 has one reward: it says nothing
    close(group_advantage(rewards_N, GROUP_N, scale="none"), [1 / 3, 0, -2 / 3, 1 / 3, 0, 0, 0, 0])
    close(group_advantage(rewards_N, GROUP_N), [0.57735, 0, -1.15470, 0.57735, 0, 0, 0, 0])
    close(rloo(rewards_N, GROUP_N), [0.5, 0, -1.0, 0.5, 0, 0, 0, 0])
    assert informative(rewards_N, GROUP_N).tolist() == [True, False, True, True, False, False, False, False]
    nothing_N = torch.full((4,), NAN)
    for scale in ("group", "batch", "none"):
        close(group_advantage(nothing_N, GROUP_N[:4], scale=scale), [0.0] * 4)


@pytest.mark.parametrize("reward", [0.1, 1 / 3, -7e8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_have_an_advantage_of_exactly_zero(reward: float, dtype: torch.dtype) -> None:
    rewards_N = torch.tensor([reward] * 7 + [0.0, 1.0], dtype=dtype)
    group_N = torch.tensor([0] * 7 + [1] * 2)
    for advantage_N in (group_advantage(rewards_N, group_N), rloo(rewards_N, group_N)):
        assert advantage_N[:7].abs().max() == 0.0
        assert advantage_N[7] < 0 < advantage_N[8]
    assert informative(rewards_N, group_N).tolist() == [False] * 7 + [True] * 2
    alone = reinforce_baseline(rewards_N[:7], group_N[:7], torch.full((7,), 9))
    assert alone.abs().max() == 0.0


def test_reinforce_is_whitening_over_the_tokens_of_the_batch() -> None:
    tokens_N = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])
    spread = torch.repeat_interleave(group_advantage(REWARDS_N, GROUP_N, scale="none"), tokens_N)
    found = torch.repeat_interleave(reinforce_baseline(REWARDS_N, GROUP_N, tokens_N), tokens_N)
    torch.testing.assert_close(found, whiten(spread))
    spread = torch.repeat_interleave(REWARDS_N, tokens_N)
    found = torch.repeat_interleave(reinforce_baseline(REWARDS_N, GROUP_N, tokens_N, baseline=False), tokens_N)
    torch.testing.assert_close(found, whiten(spread))


def test_reinforce_by_hand() -> None:
    """Rewards 2 and 0 of one token each: centred 1 and -1, variance 2, so ±0.7071; a missing one takes no part."""
    close(
        reinforce_baseline(torch.tensor([2.0, 0.0, NAN]), torch.tensor([0, 0, 0]), torch.tensor([1, 1, 50])),
        [0.7071068, -0.7071068, 0.0],
    )


@settings(max_examples=30)
@given(st.permutations(range(8)), st.permutations(range(2)))
def test_neither_the_order_of_answers_nor_of_groups_matters(order: list[int], names: list[int]) -> None:
    tokens_N = torch.arange(1, 9)
    index = torch.tensor(order)
    renamed_N = torch.tensor(names)[GROUP_N]
    for advantage in (group_advantage, rloo):
        torch.testing.assert_close(advantage(REWARDS_N[index], renamed_N[index]), advantage(REWARDS_N, GROUP_N)[index])
    torch.testing.assert_close(
        reinforce_baseline(REWARDS_N[index], renamed_N[index], tokens_N[index]),
        reinforce_baseline(REWARDS_N, GROUP_N, tokens_N)[index],
    )


@settings(max_examples=30)
@given(shift=st.floats(-100, 100), stretch=st.floats(0.5, 50))
def test_scaled_advantages_know_neither_the_zero_nor_the_unit_of_rewards(shift: float, stretch: float) -> None:
    moved = group_advantage((REWARDS_N.double() * stretch + shift), GROUP_N, eps=0.0)
    torch.testing.assert_close(moved, group_advantage(REWARDS_N, GROUP_N, eps=0.0), rtol=1e-4, atol=1e-5)


def test_the_overlong_penalty_by_hand() -> None:
    """Longest 100, buffer 20: nothing up to 80, half way -½, all of it at 100 and beyond."""
    close(overlong_penalty(torch.tensor([1, 80, 85, 90, 100, 130]), 100, 20), [0.0, 0.0, -0.25, -0.5, -1.0, -1.0])
    close(overlong_penalty(torch.tensor([1, 100]), 100, 0), [0.0, 0.0])
