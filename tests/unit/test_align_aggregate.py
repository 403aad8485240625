"""Aggregation against sums worked by hand, and its one promise: no split of a batch changes the loss."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twofold.align.aggregate import (
    Aggregation,
    aggregate,
    denominator,
    sequence_lengths,
    sequence_means,
    sequence_sums,
)
from twofold.core import ConfigError

OWNER_R = torch.tensor([0, 0, 1, 1, 1, 2])
LOSS_R = torch.tensor([1.0, 3.0, 2.0, 4.0, 6.0, 5.0])
HOW: tuple[Aggregation, ...] = ("token", "sequence", "sequence_sum", "constant")

#   how             sum over tokens                     denominator     loss
#   token           1 + 3 + 2 + 4 + 6 + 5 = 21          6 tokens        3.5
#   sequence        4/2 + 12/3 + 5/1 = 11               3 sequences     11/3
#   sequence_sum    21                                  3               7
#   constant        21                                  3 · 10          0.7
BY_HAND = {"token": (21.0, 6.0), "sequence": (11.0, 3.0), "sequence_sum": (21.0, 3.0), "constant": (21.0, 30.0)}


@pytest.mark.parametrize("how", HOW)
def test_sums_and_denominators_by_hand(how: Aggregation) -> None:
    total, size = BY_HAND[how]
    assert float(aggregate(LOSS_R, OWNER_R, 3, how)) == total
    assert denominator(sequence_lengths(OWNER_R, 3), how, length=10) == size


def test_a_mask_takes_tokens_and_whole_sequences_out() -> None:
    mask_R = torch.tensor([True, True, False, True, False, False])
    assert sequence_lengths(OWNER_R, 3, mask_R).tolist() == [2, 1, 0]
    assert sequence_sums(LOSS_R, OWNER_R, 3, mask_R).tolist() == [4.0, 4.0, 0.0]
    assert sequence_means(LOSS_R, OWNER_R, 3, mask_R).tolist() == [2.0, 4.0, 0.0]
    lengths_N = sequence_lengths(OWNER_R, 3, mask_R)
    assert [denominator(lengths_N, how, length=10) for how in HOW] == [3.0, 2.0, 2.0, 20.0]


def test_a_masked_token_may_be_anything_and_has_no_gradient() -> None:
    loss_R = torch.tensor([1.0, float("nan"), 2.0, 4.0, 6.0, 5.0], requires_grad=True)
    mask_R = torch.tensor([True, False, True, True, True, True])
    total = aggregate(loss_R, OWNER_R, 3, "sequence", mask_R)
    assert float(total.detach()) == 1 + 4 + 5
    total.backward()
    assert loss_R.grad is not None
    torch.testing.assert_close(loss_R.grad, torch.tensor([1, 0, 1 / 3, 1 / 3, 1 / 3, 1]))


def test_an_empty_batch_has_loss_zero() -> None:
    nothing = torch.zeros(0, dtype=torch.int64)
    for how in HOW:
        assert float(aggregate(torch.zeros(0), nothing, 0, how)) == 0.0
        assert denominator(torch.zeros(0, dtype=torch.int64), how, length=5) >= 1.0


def test_constant_asks_for_its_length() -> None:
    with pytest.raises(ConfigError, match="fixed length"):
        denominator(torch.tensor([3]), "constant")


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=8),
    cut=st.integers(0, 8),
    how=st.sampled_from(HOW),
    seed=st.integers(0, 99),
)
def test_no_split_changes_the_loss(lengths: list[int], cut: int, how: Aggregation, seed: int) -> None:
    """Two micro-batches, cut between any two sequences, add up to the whole."""
    owner_R = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    loss_R = torch.randn(len(owner_R), generator=torch.Generator().manual_seed(seed))
    first_R = owner_R < cut
    first = min(cut, len(lengths))
    parts = aggregate(loss_R[first_R], owner_R[first_R], first, how)
    parts = parts + aggregate(loss_R[~first_R], owner_R[~first_R] - first, len(lengths) - first, how)
    size = denominator(torch.tensor(lengths), how, length=6)
    torch.testing.assert_close(parts / size, aggregate(loss_R, owner_R, len(lengths), how) / size)
