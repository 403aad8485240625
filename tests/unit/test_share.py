"""How a batch is divided: whole units of bound sequences, each token with what is beside it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from twofold.data import Batch
from twofold.train.axes import pad
from twofold.train.share import cut, nothing, share

LENGTHS = (5, 9, 2, 2, 7, 30, 1, 4, 4, 6)


def batch(lengths: tuple[int, ...], bound: int = 1) -> Batch:
    """Numbered tokens; beside each its number, and its number in a pair of columns."""
    ids_T = torch.arange(1, sum(lengths) + 1)
    beside = {"number": ids_T.float(), "wide": torch.stack((ids_T, -ids_T), 1)}
    return Batch(ids_T, ids_T + 1, lengths, beside=beside, bound=bound)


def check(part: Batch) -> None:
    """What is beside a token is its own, and nothing is beside padding."""
    own_T = torch.arange(len(part.ids_T)) < len(part.ids_T) - part.padding
    expected_T: Tensor = part.ids_T * own_T
    assert part.beside["number"].tolist() == expected_T.tolist()
    assert part.beside["wide"].tolist() == torch.stack((expected_T, -expected_T), 1).tolist()
    assert (part.targets_T[~own_T] == -100).all()
    assert sum(part.lengths) == len(part.ids_T) and sum(part.lengths[: part.own]) == int(own_T.sum())
    assert part.own % part.bound == 0


def test_unbound_sequences_are_divided_as_ever() -> None:
    whole = batch(LENGTHS)
    assert [part.lengths for part in cut(whole, 12)] == [(5,), (9, 2), (2, 7), (30,), (1, 4, 4), (6,)]
    ranks = [[(part.lengths, part.first, part.padding) for part in share(whole, 3, rank, 12)] for rank in range(3)]
    assert ranks == [
        [((5,), 0, 0), ((9, 2), 5, 0), ((2, 7), 16, 0)],
        [((1,), 0, 1), ((1,), 0, 1), ((30,), 25, 0)],
        [((1,), 0, 1), ((1, 4, 4), 55, 0), ((6,), 64, 0)],
    ]
    assert cut(whole, None) == [whole] == share(whole, 1, 0, None)


def test_pairs_stay_together() -> None:
    whole = batch(LENGTHS, bound=2)
    assert whole.units() == (14, 4, 37, 5, 10)
    assert [part.lengths for part in cut(whole, 20)] == [(5, 9, 2, 2), (7, 30), (1, 4, 4, 6)]
    ranks = [[part.lengths for part in share(whole, 2, rank, None)] for rank in range(2)]
    assert ranks == [[(5, 9, 2, 2)], [(7, 30, 1, 4, 4, 6)]]


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    bound=st.integers(1, 3),
    ranks=st.integers(1, 4),
    tokens=st.none() | st.integers(1, 90),
    multiple=st.integers(1, 7),
)
def test_every_unit_is_somewhere_once(
    lengths: list[int], bound: int, ranks: int, tokens: int | None, multiple: int
) -> None:
    whole = batch(tuple(lengths * bound), bound)
    shares = [share(whole, ranks, rank, tokens) for rank in range(ranks)]
    assert len({len(parts) for parts in shares}) == 1
    seen: list[int] = []
    sizes: list[int] = []
    for part in (part for parts in shares for part in parts):
        check(part)
        own = len(part.ids_T) - part.padding
        assert tokens is None or own <= tokens or part.own == bound
        assert not part.padding or part.own == 0
        assert own == 0 or part.places()[:own].tolist() == (part.ids_T[:own] - 1).tolist()
        seen += part.ids_T[:own].tolist()
        sizes += part.lengths[: part.own]
        padded = pad(part, multiple)
        check(padded)
        assert len(padded.ids_T) % multiple == 0 and padded.own == part.own and padded.bound == bound
    assert seen == whole.ids_T.tolist() and tuple(sizes) == whole.lengths


@pytest.mark.parametrize("bound", [1, 2])
def test_nothing_is_nobodys(bound: int) -> None:
    part = nothing(batch((3, 4), bound))
    check(part)
    assert part.own == 0 and set(part.beside) == {"number", "wide"}
