"""The batch solver against DeepSpeed's own example and brute force; the spike rule by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twofold.core import ConfigError
from twofold.train.elastic import HIGHLY_COMPOSITE, ElasticConfig, best_batch, lines, split, splits
from twofold.train.spikes import Spikes


def test_deepspeeds_own_example() -> None:
    """Their test of elasticity 0.1: at most 10000, micro-batches 8, 12, 16, 17, 32 to 1500 ranks."""
    batch, ranks = best_batch(10000, [8, 12, 16, 17], 32, 1500)
    assert batch == 9792 and len(ranks) == 23
    assert all(any(batch % (n * micro) == 0 for micro in (8, 12, 16, 17)) for n in ranks)


def test_highly_composite_numbers() -> None:
    divisors = [0] * 60_000
    for n in range(1, len(divisors)):
        for multiple in range(n, len(divisors), n):
            divisors[multiple] += 1
    most, found = 0, []
    for n, count in enumerate(divisors):
        if count > most:
            most, found = count, [*found, n]
    assert tuple(found) == tuple(n for n in HIGHLY_COMPOSITE if n < len(divisors))


def test_no_batch_is_said() -> None:
    with pytest.raises(ConfigError, match="no batch of up to 10 sequences in micro-batches of 4 is even over 7 to 9"):
        best_batch(10, [4], 7, 9)
    with pytest.raises(ConfigError, match="no batch"):
        best_batch(3, [4], 1, 2)


@given(st.integers(1, 400), st.integers(1, 20), st.integers(1, 40))
def test_every_number_of_ranks_takes_the_whole_batch(sequences: int, most: int, ranks: int) -> None:
    found = split(sequences, most, ranks)
    assert found.micro <= most and ranks * found.micro_batches * found.micro >= sequences
    busiest = max(len(range(rank, sequences, ranks)) for rank in range(ranks))
    assert (found.micro_batches - 1) * most < busiest, "no micro-batch more than is needed"
    assert found.idle == pytest.approx(1 - sequences / (ranks * busiest))
    assert found.even == (sequences % ranks == 0)


def test_splits_by_hand() -> None:
    found = {one.ranks: (one.micro_batches, one.micro, round(one.idle, 3)) for one in splits(8, 2, [1, 2, 3, 4, 8])}
    assert found == {1: (4, 2, 0.0), 2: (2, 2, 0.0), 3: (2, 2, 0.111), 4: (1, 2, 0.0), 8: (1, 1, 0.0)}
    assert [one.ranks for one in splits(8, 2, range(1, 9), per_copy=4)] == [4, 8]


def test_what_a_run_says() -> None:
    config = ElasticConfig(min=1, max=4)
    first, second = lines(config, 8 * 64, 2 * 64, 64)
    assert first.endswith("by ranks: 1: 4 x 2, 2: 2 x 2, 3: 2 x 2 (11% idle), 4: 1 x 2")
    assert second == "elastic: tokens_per_step = 768 would be even for all of these numbers"
    assert len(lines(config, 12 * 64, 2 * 64, 64)) == 1
    assert lines(ElasticConfig(), 512, None, 64) == []


def test_too_few_and_too_many_ranks() -> None:
    config = ElasticConfig(min=2, max=3)
    config.admit(2)
    with pytest.raises(ConfigError, match=r"1 ranks are fewer than elastic\.min, 2"):
        config.admit(1)
    with pytest.raises(ConfigError, match=r"4 ranks are more than elastic\.max, 3"):
        config.admit(4)
    with pytest.raises(ConfigError, match=r"elastic\.max is 1, less than elastic\.min, 2"):
        ElasticConfig(min=2, max=1)
    with pytest.raises(ConfigError, match="spike_factor must be more than 1"):
        ElasticConfig(spike_factor=1.0)


def test_spikes_by_hand() -> None:
    spikes = Spikes(ElasticConfig(on_spike="skip", window=3, spike_factor=2.0))
    assert [spikes.look(loss) for loss in (1.0, 90.0, 3.0)] == [None] * 3, "the window is not full"
    assert spikes.look(6.0) is None, "twice the median of 1, 90 and 3, not more"
    why = spikes.look(12.5)
    assert why == "the loss, 12.5, is more than 2 times 6, the median of the last 3"
    assert spikes.state() == [90.0, 3.0, 6.0], "a spike does not count towards the next"
    assert spikes.look(math.nan) is None and spikes.look(math.inf) is None
    again = Spikes(spikes.config, spikes.state())
    assert again.look(12.5) == why


def test_without_a_policy_nothing_is_a_spike() -> None:
    spikes = Spikes()
    assert not any(spikes.look(10.0**power) for power in range(60)) and spikes.state() == []
