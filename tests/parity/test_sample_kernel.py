"""The sampler's kernel against its definition, over vocabularies of every shape, and against itself among others."""

from __future__ import annotations

import math
import random

import pytest
import torch

from twofold.kernels import native
from twofold.kernels import sample as kernel
from twofold.kernels.sample import NOT_FINITE, NOTHING_LEFT, Choice, Chosen
from twofold.kernels.sample_native import choose_rows, score_rows

pytestmark = pytest.mark.skipif(bool(native.missing()), reason=native.missing())
VOCABS = (1, 2, 15, 16, 17, 255, 257, 1023, 1024, 1025, 4099, 50_001)


def some_choice(rng: random.Random, vocab: int) -> Choice:
    ids = [rng.randrange(vocab) for _ in range(30)]
    temperature = rng.choice([0.0, 0.2, 1.0, 1.9])
    words = -(-vocab // 32)
    bits = bytearray(rng.choice((0, 255, rng.randrange(256))) for _ in range(4 * words))
    for token in (*ids[:9], 0):
        bits[token >> 3] |= 1 << (token & 7)
    return Choice(
        temperature=temperature,
        top_p=rng.choice([1.0, 1.0, 0.95, 0.5, 0.01, 0.9999]),
        top_k=rng.choice([0, 0, 1, 3, 40, vocab - 1, vocab + 7]),
        min_p=rng.choice([0.0, 0.0, 0.02, 0.7, 1.0]),
        u=rng.random(),
        repetition=rng.choice([1.0, 1.0, 1.4, 0.7]),
        frequency=rng.choice([0.0, 0.0, 0.6, -0.5]),
        presence=rng.choice([0.0, 0.0, 1.1]),
        seen=ids,
        counted=ids[:12],
        mask=rng.choice([None, None, bytes(bits)]),
        allowed=rng.choice([None, None, None, tuple({*ids, 0})]),
        bias=rng.choice([{}, {}, {ids[0]: 3.0}]),
        banned=rng.choice([(), (), tuple(ids[3:5])]),
        report=rng.choice([None, "raw", "tempered", "processed", "beam" if temperature == 0.0 else "raw"]),
        tops=rng.choice([0, 1, 5, 20]),
    )


def some_rows(vocab: int, rows: int, seed: int) -> tuple[torch.Tensor, list[Choice]]:
    rng = random.Random(seed)
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * rng.choice([0.1, 3.0, 20.0])
    return logits, [some_choice(rng, vocab) for _ in range(rows)]


def borders(logits: torch.Tensor, choice: Choice) -> list[float]:
    """The reference's running sums: a draw whose u lies on one may fall to either side by rounding."""
    x = kernel._edited(logits[None], [choice])
    p = kernel._distribution(x, [choice])[0].double()
    return (p.cumsum(0) / p.sum()).tolist()


def agrees(ours: Chosen | str, theirs: Chosen | str, logits: torch.Tensor, choice: Choice) -> None:
    if isinstance(ours, str) or isinstance(theirs, str):
        assert ours == theirs
        return
    if ours.id != theirs.id and choice.report != "beam":  # a beam's are log-probabilities, rounded in both
        assert choice.temperature > 0, "a greedy token is exact"
        assert min(abs(border - choice.u) for border in borders(logits, choice)) < 2e-6, choice
        return
    if choice.report is None:
        assert ours == Chosen(ours.id)
        return
    assert ours.logprob == pytest.approx(theirs.logprob, abs=3e-5)
    if choice.report == "raw":
        assert abs(ours.rank - theirs.rank) <= 1
    assert len(ours.top) == len(theirs.top)
    for (_, mine), (_, other) in zip(ours.top, theirs.top):
        assert mine == pytest.approx(other, abs=3e-5)


@pytest.mark.parametrize("vocab", VOCABS)
def test_it_chooses_as_the_definition_does(vocab: int) -> None:
    logits, choices = some_rows(vocab, 24 if vocab > 5000 else 60, vocab)
    ours, theirs = choose_rows(logits, choices), kernel.choose.reference(logits, choices)
    for row, choice in enumerate(choices):
        agrees(ours[row], theirs[row], logits[row], choice)
    scored = score_rows(logits, [row % vocab for row in range(len(logits))], 4)
    truth = torch.log_softmax(logits.double(), -1)
    for row, found in enumerate(scored):
        assert found.logprob == pytest.approx(truth[row, found.id].item(), abs=2e-6, rel=1e-6)
        values, ids = logits[row].sort(descending=True, stable=True)
        assert [i for i, _ in found.top] == ids[:4].tolist()
        assert found.rank == int((values > logits[row, found.id]).sum()) + 1


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_a_row_has_its_bits_alone_and_among_others(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        logits, choices = some_rows(4099, 33, 5)
        together = choose_rows(logits, choices)
    finally:
        torch.set_num_threads(before)
    assert together == [choose_rows(logits[i : i + 1], choices[i : i + 1])[0] for i in range(33)]


def test_equal_logits_and_hard_ones() -> None:
    flat = torch.zeros(1, 3001)
    assert choose_rows(flat, [Choice(temperature=0.0)])[0].id == 0
    for cut in ({"top_k": 3}, {"top_p": 0.01}, {"min_p": 1.0}):  # ties at a cut are all kept
        assert choose_rows(flat, [Choice(u=0.9999, **cut)])[0].id > 2990
    steep = torch.full((1, 300), -3e38)
    steep[0, 7] = 3e38
    assert choose_rows(steep, [Choice(temperature=0.01, u=0.5, top_p=0.9, report="processed", tops=3)]) == [
        Chosen(7, 0.0, 1, ((7, 0.0),))
    ]
    assert choose_rows(torch.tensor([[1.0, 5e-39]]), [Choice(temperature=1.0, u=0.999999)])[0].id == 1


def test_faults_stay_in_their_row() -> None:
    logits, choices = some_rows(700, 5, 2)
    clean = choose_rows(logits, choices)
    for value in (math.nan, math.inf, -math.inf):
        logits[3, 699] = value
        said = choose_rows(logits, choices)
        assert said[3] == NOT_FINITE and said[:3] + said[4:] == clean[:3] + clean[4:]
    logits[3, 699] = 0.0
    assert choose_rows(logits[:1], [Choice(allowed=(4,), banned=(4,))]) == [NOTHING_LEFT]
    for wrong in ({"allowed": (700,)}, {"banned": (-1,)}, {"bias": {900: 1.0}}):
        with pytest.raises(IndexError, match="0 to 699"):
            choose_rows(logits[:1], [Choice(**wrong)])
    with pytest.raises(IndexError):
        score_rows(logits[:1], [700], 0)


@pytest.mark.parametrize("choose", [kernel.choose.reference, choose_rows])
def test_only_tokens_of_the_mask_are_chosen_and_the_models_own_numbers_are_reported(choose) -> None:  # type: ignore[no-untyped-def]
    logits = torch.randn(1, 70, generator=torch.Generator().manual_seed(0))
    best = int(logits.argmax())
    for token in (0, 31, 32, 63, 64, 69):
        mask = bytearray(12)
        mask[token >> 3] = 1 << (token & 7)
        for temperature in (0.0, 1.0):
            how = {"temperature": temperature, "u": 0.7, "tops": 2, "mask": bytes(mask)}
            (raw,) = choose(logits, [Choice(report="raw", **how)])
            (drawn,) = choose(logits, [Choice(report="processed", **how)])
            assert raw.id == drawn.id == token and raw.top[0][0] == best
            assert raw.logprob == pytest.approx(float(torch.log_softmax(logits[0], -1)[token]), abs=1e-6)
            assert drawn.logprob == 0.0 and drawn.top == ((token, 0.0),)
    assert choose(logits, [Choice(mask=bytes(12))]) == [NOTHING_LEFT]


def test_a_mask_has_a_bit_for_every_token() -> None:
    with pytest.raises(IndexError, match="a mask of 64 bits for a vocabulary of 70"):
        choose_rows(torch.zeros(1, 70), [Choice(mask=bytes(8))])


def test_nothing_to_choose_is_no_work() -> None:
    assert kernel.choose(torch.empty(0, 12), []) == [] and kernel.score(torch.empty(0, 12), [], 3) == []


def test_rows_need_not_be_side_by_side() -> None:
    wide = torch.randn(6, 900)
    part = wide[::2, :700]
    choices = [Choice(u=0.3, report="raw")] * 3
    assert choose_rows(part, choices) == choose_rows(part.contiguous(), choices)
