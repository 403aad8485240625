"""What the balance benchmark claims: every method uses a mixture's experts more evenly than none does."""

from __future__ import annotations

import balance
import pytest

SMALL = balance.Size(steps=40, sequences=8, length=48, vocab=128)


@pytest.fixture(scope="module")
def none() -> dict[str, float]:
    return balance.train(balance.METHODS["none"], SMALL)


@pytest.mark.parametrize("method", [name for name in balance.METHODS if name != "none"])
def test_the_busiest_share_falls(none: dict[str, float], method: str) -> None:
    found = balance.train(balance.METHODS[method], SMALL)
    assert found["busiest_in_training"] < 0.9 * none["busiest_in_training"]
    assert found["loss"] < none["loss"] + 0.1


def test_the_corpus_is_skewed_and_learned(none: dict[str, float]) -> None:
    ids, _ = balance.Corpus(SMALL).batch(0)
    counts = ids.bincount(minlength=SMALL.vocab).sort(descending=True).values
    assert int(counts[:4].sum()) > 0.3 * len(ids)
    assert none["busiest"] > 1.5 / SMALL.experts and none["loss"] < 4.4
