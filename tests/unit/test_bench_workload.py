"""The workloads are what the goals speak of: the same lengths for everybody, fresh tokens for every turn."""

from __future__ import annotations

import pytest
from workload import NAMES, Sizes, Workload, workload

FULL = Sizes(cores=4, vocab=151_936)


def shape(work: Workload) -> list[tuple[int, int]]:
    return [(len(prompt), new) for prompt, new in zip(work.prompts, work.outputs, strict=True)]


def test_the_full_sizes() -> None:
    assert shape(workload("A", 0, FULL)) == [(32, 128)]
    assert shape(workload("B", 0, FULL)) == [(1024, 1)]
    assert shape(workload("C", 0, FULL)) == [(64, 64)] * 32
    mixed = shape(workload("D", 0, FULL))
    assert len(mixed) == 48 and all(16 <= p <= 512 and 8 <= o <= 128 for p, o in mixed)
    assert min(p for p, _ in mixed) < 60 and max(p for p, _ in mixed) > 450
    assert shape(workload("E", 0, FULL)) == [(528, 16)] * 32


@pytest.mark.parametrize("name", NAMES)
def test_a_turn_brings_fresh_tokens_of_the_same_lengths(name: str) -> None:
    first, again, second = workload(name, 0, FULL), workload(name, 0, FULL), workload(name, 1, FULL)
    assert first == again
    assert shape(first) == shape(second)
    assert not set(first.prompts) & set(second.prompts)
    assert all(256 <= token < FULL.vocab for prompt in first.prompts for token in prompt)


def test_e_shares_a_prefix_and_warm_keeps_it() -> None:
    cold, warm = workload("E", 3, FULL), workload("E", 3, FULL, ends="again")
    prefixes = {prompt[: cold.shared] for prompt in (*cold.prompts, *warm.prompts)}
    assert cold.shared == warm.shared == 512 and len(prefixes) == 1
    assert len({prompt[512:] for prompt in (*cold.prompts, *warm.prompts)}) == 64
    assert workload("E", 4, FULL).prompts[0][:512] not in prefixes


def test_a_small_machine_gets_fewer_requests_and_is_told_so() -> None:
    two = Sizes(cores=2, vocab=1000)
    assert [len(workload(name, 0, two).prompts) for name in NAMES] == [1, 1, 16, 24, 16]
    assert workload("D", 0, two).scaled == "requests of C, D and E times 0.5"
    quick = Sizes(cores=8, vocab=1000, quick=True)
    assert shape(workload("B", 0, quick)) == [(256, 1)] and len(workload("C", 0, quick).prompts) == 8
    assert "lengths times 0.25" in quick.told() and FULL.told() == "not scaled"


def test_a_warm_up_is_short_but_has_the_shape() -> None:
    work = workload("D", 0, FULL).to_warm_up()
    assert len(work.prompts) == 12 and set(work.outputs) == {2}
