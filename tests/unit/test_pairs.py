"""Batches for alignment: pairs side by side, KTO's mismatches, prompts; each a function of its number."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from twofold.core import ConfigError
from twofold.data import Batch, Corpus, Examples, Limits, PairLoader, Prompt, PromptLoader, UnpairedLoader
from twofold.data.examples import Counts
from twofold.data.order import Order


def examples(sizes: Sequence[tuple[int, int]], values: Sequence[float], seq_len: int = 99) -> Examples:
    """Example d has prompt ids 100 d, 100 d + 1 ... and completion ids 100 d + 50, 100 d + 51 ..."""
    pairs = [
        ([100 * d + i for i in range(p)] + [100 * d + 50 + i for i in range(c)], [False] * p + [True] * c)
        for d, (p, c) in enumerate(sizes)
    ]
    corpus = Corpus.of(pairs)
    answers = corpus.starts[:-1] + np.array([p for p, _ in sizes])
    made = np.array(values, dtype=np.float32)
    return Examples(corpus=corpus, answers=answers, values=made, limits=Limits(seq_len=seq_len), counts=Counts())


def sequences(batch: Batch) -> list[tuple[list[int], list[int]]]:
    ids, targets = (torch.split(values, batch.lengths) for values in (batch.ids_T, batch.targets_T))
    return [(a.tolist(), b.tolist()) for a, b in zip(ids, targets, strict=True)]


SIZES = [(2, 3), (2, 1), (1, 2), (1, 4)]


def test_pairs_stand_side_by_side() -> None:
    loader = PairLoader(examples(SIZES, [0.5, 0.5, 2.0, 2.0]), 2, shuffle=False)
    batch = loader.batch(0)
    assert batch.bound == 2 and batch.lengths == (4, 2, 2, 4) and batch.own == 4
    assert sequences(batch) == [
        ([0, 1, 50, 51], [-100, 50, 51, 52]),
        ([100, 101], [-100, 150]),
        ([200, 250], [250, 251]),
        ([300, 350, 351, 352], [350, 351, 352, 353]),
    ]
    assert batch.beside["margin"].tolist() == [0.5] * 6 + [2.0] * 6 and batch.beside["margin"].dtype == torch.float32


def test_a_score_is_read_at_the_last_id() -> None:
    batch = PairLoader(examples(SIZES, [0.0] * 4), 1, shuffle=False, whole=True).batch(0)
    assert batch.lengths == (5, 3)
    assert sequences(batch) == [
        ([0, 1, 50, 51, 52], [-100, 50, 51, 52, -100]),
        ([100, 101, 150], [-100, 150, -100]),
    ]


@given(pairs=st.integers(1, 30), size=st.integers(1, 9), seed=st.integers(0, 3), at=st.integers(0, 50))
def test_a_batch_is_a_function_of_its_number(pairs: int, size: int, seed: int, at: int) -> None:
    made = examples([(1 + d % 3, 1 + d % 4) for d in range(2 * pairs)], [float(d // 2) for d in range(2 * pairs)])
    used, fresh = (PairLoader(made, size, seed=seed) for _ in range(2))
    for index in range(3):
        used.batch(index)
    assert sequences(used.batch(at)) == sequences(fresh.batch(at))
    seen: list[int] = []
    for batch in fresh.once():
        firsts = [ids[0] // 100 for ids, _ in sequences(batch)]
        assert all(right == left + 1 and left % 2 == 0 for left, right in zip(firsts[::2], firsts[1::2], strict=True))
        margins = torch.split(batch.beside["margin"], batch.lengths)
        assert [set(m.tolist()) for m in margins] == [{float(first // 2)} for first in firsts]
        seen += firsts
    assert sorted(seen) == list(range(2 * pairs))
    assert len(list(fresh.once(1))) == 1 and len(list(fresh.once())) == len(fresh) == -(-pairs // size)


def test_each_prompt_meets_its_neighbours_completion() -> None:
    loader = UnpairedLoader(examples(SIZES, [1.0, 0.0, 0.0, 1.0], seq_len=5), 3, shuffle=False)
    batch, moved = loader.batch(0), loader.mismatched(0)
    assert batch.bound == 1 and batch.beside["label"].tolist() == [1.0] * 4 + [0.0] * 4
    assert sequences(moved) == [
        ([0, 1, 250], [-100, 250, 251]),
        ([100, 101, 50, 51], [-100, 50, 51, 52]),
        ([200], [150]),
    ]
    assert sequences(loader.batch(1))[0][0][0] == 300  # and the next epoch goes on behind it
    assert sequences(loader.mismatched(1))[0] == ([300], [150])
    whole = list(loader.once())
    assert [len(batch.lengths) for batch, _ in whole] == [len(moved.lengths) for _, moved in whole] == [3, 1]


def test_a_mismatched_completion_loses_its_end() -> None:
    made = examples([(4, 1), (1, 4)], [1.0, 0.0], seq_len=5)
    assert sequences(UnpairedLoader(made, 2, shuffle=False).mismatched(0)) == [
        ([0, 1, 2, 3], [-100, -100, -100, 150]),
        ([100], [50]),
    ]


def test_prompts_by_number() -> None:
    prompts = [Prompt(number=n, ids=(n,)) for n in range(10)]
    loader = PromptLoader(prompts, 4, seed=1)
    assert [prompt.number for index in range(5) for prompt in loader.batch(index)][:10] != list(range(10))
    assert sorted(prompt.number for index in range(5) for prompt in loader.batch(index)) == sorted([*range(10)] * 2)
    assert loader.take(4, 8) == loader.batch(1) == PromptLoader(prompts, 4, seed=1).batch(1)
    plain = PromptLoader(prompts, 4, shuffle=False)
    assert [[prompt.number for prompt in batch] for batch in plain.once()] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert len(plain) == 3 and len(list(plain.once(2))) == 2


def test_an_order_goes_on_over_epochs() -> None:
    order = Order(7, seed=5)
    assert order.take(5, 9) == [*order.epoch(0)[5:], *order.epoch(1)[:2]]
    assert order.take(0, 7) != order.take(7, 14) and sorted(order.take(7, 14)) == list(range(7))


def test_what_cannot_be_a_batch() -> None:
    some, none = examples(SIZES, [0.0] * 4), examples([], [])
    with pytest.raises(ConfigError, match="1 pair or more, not 0"):
        PairLoader(some, 0)
    with pytest.raises(ConfigError, match="2 or more, not 1"):
        UnpairedLoader(some, 1)
    for empty in (lambda: PairLoader(none, 1), lambda: UnpairedLoader(none, 2), lambda: PromptLoader([], 1)):
        with pytest.raises(ConfigError, match="nothing to read"):
            empty()
