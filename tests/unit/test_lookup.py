"""Guesses found in text, without any model."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from twofold.engine.lookup import BORDER, NGram, Outputs, Suffix, Text
from twofold.engine.request import Request
from twofold.engine.row import Row
from twofold.engine.sampling import SamplingParams


def row(prompt, *, serial=0, output=(), salt=""):
    request = Request(id=f"r{serial}", prompt_ids=tuple(prompt), params=SamplingParams(), salt=salt)
    request.output_ids.extend(output)
    return Row(request, serial=serial, urgency=0, room=100, block_size=16)


def guess(proposer, one, count=4):
    return proposer.propose([(one, count)]).get(one.serial)


def test_an_ngram_is_the_latest_longest():
    text = [1, 2, 3, 10, 11, 0, 2, 3, 20, 21, 0, 9, 3, 30, 31, 0, 1, 2, 3]
    assert guess(NGram(1, 3), row(text)).tokens == (10, 11, 0, 2), "three tokens agree with the first place alone"
    assert guess(NGram(1, 2), row(text)).tokens == (20, 21, 0, 9), "of two places with two tokens, the later"
    assert guess(NGram(1, 1), row(text)).tokens == (30, 31, 0, 1)
    assert guess(NGram(1, 3), row([1, 2, 3, 4])) is None and guess(NGram(2, 3), row([5])) is None


def test_a_text_that_goes_round_is_continued_round():
    assert guess(NGram(2, 4), row([8, 1, 2, 3] + [1, 2, 3] * 2), 7).tokens == (1, 2, 3, 1, 2, 3, 1)
    assert guess(NGram(1, 4), row([5, 5]), 5).tokens == (5,) * 5


def test_grades_grow_with_what_agrees():
    few = guess(NGram(1, 4), row([1, 7, 2, 9, 7]))
    many = guess(NGram(1, 4), row([*range(9), 50, *range(9)]))
    assert few.grades == (1, 2, 3, 4) and many.grades == (9, 10, 11, 12)
    assert guess(NGram(1, 4), row([3] * 60), 5).grades == (23,) * 5


def test_a_row_is_kept_up_with():
    one, proposer = row([1, 2, 3, 4, 1]), NGram(1, 4)
    assert guess(proposer, one, 2).tokens == (2, 3)
    one.request.output_ids += [2, 3]
    assert guess(proposer, one, 2).tokens == (4, 1)
    proposer.forget(one)
    assert guess(proposer, row([9, 8, 9]), 1).tokens == (8,)


@settings(max_examples=200)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 3), st.integers(0, 3))
def test_ngrams_are_what_a_plain_search_finds(tokens, least, more):
    most = least + more
    found = guess(NGram(least, most), row(tokens), 3)
    places = {
        place: size
        for place in range(least, len(tokens))
        for size in range(least, min(most, place) + 1)
        if tokens[place - size : place] == tokens[len(tokens) - size :]
    }
    if not places:
        assert found is None
        return
    near = sorted((place for place in places if place_agrees(tokens, place, least)), reverse=True)[:16]
    longest = max(places[place] for place in near)
    best = next(place for place in near if places[place] == longest)
    text = list(tokens)
    for ahead in range(3):
        assert found.tokens[ahead] == text[best + ahead]
        text.append(found.tokens[ahead])


def place_agrees(tokens, place, size):
    return tokens[place - size : place] == tokens[len(tokens) - size :]


def test_suffixes_are_decided_by_counts():
    text = [1, 2, 5, 0, 1, 2, 6, 0, 1, 2, 5, 9, 1, 2]
    found = guess(Suffix(8, 0, 0.5), row(text))
    assert found.tokens[0] == 5, "twice 5, once 6"
    assert len(guess(Suffix(8, 0, 0.6), row(text)).tokens) == 1, "5 came twice in three, 5 9 once"
    assert guess(Suffix(8, 0, 0.9), row(text)) is None
    alone = guess(Suffix(8, 0, 0.9), row([*range(20), *range(5)]), 3)
    assert alone.tokens == (5, 6, 7) and alone.grades == (5, 6, 7)


def test_suffixes_come_from_what_others_said_but_not_from_other_tenants():
    proposer = Suffix(8, 100, 0.1)
    proposer.forget(row([1], serial=1, output=[40, 41, 42, 43, 44], salt="a"))
    assert guess(proposer, row([7, 40, 41], serial=2, salt="a")).tokens == (42, 43, 44)
    assert guess(proposer, row([7, 40, 41], serial=3, salt="b")) is None
    assert guess(proposer, row([43, 44], serial=4, salt="a")) is None, "nothing beyond the end of an output"
    silent = Suffix(8, 0, 0.1)
    silent.forget(row([1], serial=1, output=[40, 41, 42]))
    assert guess(silent, row([40, 41], serial=2)) is None


def test_tenants_and_outputs_are_bounded():
    proposer = Suffix(8, 100, 0.1)
    for number in range(50):
        proposer.forget(row([1], serial=number, output=[1, 2, 3], salt=f"s{number}"))
    assert len(proposer._said) <= 8
    outputs = Outputs(2, requests=10, tokens=400)
    for number in range(300):
        outputs.add([number] * random.Random(number).randrange(1, 900))
        assert len(outputs.texts) <= 2 and sum(len(text.tokens) for text in outputs.texts) <= 400
    assert all(text.tokens[-1] == BORDER for text in outputs.texts if text.tokens)


def test_a_text_finds_every_place_of_a_run_latest_first():
    text = Text(2)
    text.extend([1, 2, 0, 1, 2, 9, 1, 2])
    assert list(text.places([1, 2])) == [5, 2] and list(text.places([9, 9])) == [] and list(text.places([1])) == []
