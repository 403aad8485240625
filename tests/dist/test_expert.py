"""Experts on several ranks: hidden states, gradients, biases and figures are those of one process."""

from __future__ import annotations

import expert_ranks
import pytest

from twofold.core import ConfigError
from twofold.models.exchange import expert_rows
from twofold.parallel.expert import Rows, rows_of
from twofold.train.moe_config import MoeConfig

EVERYTHING = MoeConfig(balance_loss=0.3, z_loss=0.1, bias_rate=0.01, noise="gumbel")
DROPPING = MoeConfig(balance_loss=0.3, over="micro", capacity=1.0, min_capacity=1, noise="jitter")


@pytest.mark.parametrize(("world", "ep"), [(2, 2), (4, 4), (4, 2)])
def test_a_step_is_that_of_one_process(world: int, ep: int) -> None:
    """The balance is judged over all ranks, and the noise is a token's own: one process sees one micro-batch."""
    expert_ranks.run(world, ep, EVERYTHING, together=True)


def test_with_capacity_a_rank_is_a_micro_batch() -> None:
    expert_ranks.run(2, 2, DROPPING)


def test_layers_may_be_run_again_and_experts_may_have_nothing_to_do() -> None:
    """Ranks 1 to 3 of four have no token in the first layer, and still join its exchanges, twice."""
    expert_ranks.run(4, 4, MoeConfig(balance_loss=0.3), together=True, crowded=True, again=True)


def test_rows_of_a_rank() -> None:
    assert [rows_of(6, 3, rank) for rank in range(3)] == [
        Rows(start=0, stop=2, whole=6),
        Rows(start=2, stop=4, whole=6),
        Rows(start=4, stop=6, whole=6),
    ]
    rows = expert_rows(expert_ranks.model(crowded=False), 4, 3)
    assert set(rows) == {f"layers.{i}.experts.{part}.weight" for i in (0, 2) for part in ("gate_up", "down")}
    assert {(r.start, r.stop) for r in rows.values()} == {(6, 8)}
    with pytest.raises(ConfigError, match=r"8 experts cannot be divided among 3 ranks: parallel.ep may be 1, 2, 4, 8"):
        expert_rows(expert_ranks.model(crowded=False), 3, 0)
