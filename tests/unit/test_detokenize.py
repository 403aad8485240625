"""TextStream: the pieces joined are the whole, and stop strings cut it in one place however the ids arrive."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.unit import toy_tokenizers as toys
from twofold.data import TextStream, Tokenizer

IDS = st.lists(st.integers(0, 420), max_size=40)
WORDS = st.text(alphabet="ab<|>é🙂 ", max_size=30)
MAKERS = {"bytes": toys.byte_level, "fallback": toys.sentencepiece_like, "metaspace": toys.metaspace}


@pytest.fixture(scope="module", params=MAKERS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return toys.save(MAKERS[request.param](), tmp_path_factory.mktemp(request.param))


def run(stream: TextStream, ids: list[int], sizes: list[int]) -> str:
    """Push `ids` cut into pieces of the given sizes, in turn; what was shown, joined."""
    shown, place, turn = [], 0, 0
    while place < len(ids):
        size = sizes[turn % len(sizes)]
        shown.append(stream.push(ids[place : place + size]))
        place, turn = place + size, turn + 1
    return "".join(shown) + stream.finish()


@given(ids=IDS, sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4), skip=st.booleans())
@example(ids=[3, 5], sizes=[1], skip=True)
def test_pieces_joined_are_the_whole(tokenizer: Tokenizer, ids: list[int], sizes: list[int], skip: bool) -> None:
    stream = TextStream(tokenizer, skip_special_tokens=skip)
    assert run(stream, ids, sizes) == tokenizer.decode(ids, skip_special_tokens=skip) == stream.text
    assert stream.tokens == len(ids) and stream.stopped is None


@given(text=st.text(max_size=20))
def test_no_broken_character_is_shown(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    whole = tokenizer.decode(ids)
    stream = TextStream(tokenizer)
    for token in ids:
        stream.push([token])
        assert whole.startswith(stream.text)


@given(text=WORDS, stop=st.text(alphabet="ab<|>é🙂 ", min_size=1, max_size=4), size=st.integers(1, 4))
def test_stop_cuts_where_split_does(tokenizer: Tokenizer, text: str, stop: str, size: int) -> None:
    ids = tokenizer.encode(text)
    whole = tokenizer.decode(ids)
    stream = TextStream(tokenizer, stop=[stop])
    assert run(stream, ids, [size]) == whole.split(stop)[0]
    assert (stream.stopped == stop) == (stop in whole)
    kept = TextStream(tokenizer, stop=[stop], include_stop=True)
    assert run(kept, ids, [size]) == whole.split(stop)[0] + (stop if stop in whole else "")


@given(text=WORDS, stops=st.lists(st.text(alphabet="ab<|> ", min_size=1, max_size=4), max_size=4))
def test_the_stop_that_completes_first_wins(tokenizer: Tokenizer, text: str, stops: list[str]) -> None:
    ids = tokenizer.encode(text)
    whole = tokenizer.decode(ids)
    expected = whole
    for end in range(len(whole) + 1):  # the slow truth: grow the text, look for any stop at its end
        ends = [stop for stop in stops if whole[:end].endswith(stop)]
        if ends:
            expected = whole[: end - len(max(ends, key=len))]
            break
    for sizes in ([1], [2, 3], [50]):
        assert run(TextStream(tokenizer, stop=stops), ids, sizes) == expected


def test_held_back_only_while_it_may_stop(tmp_path) -> None:
    tokenizer = toys.save(toys.byte_level(), tmp_path)
    stream = TextStream(tokenizer, stop=["STOP"])
    letter = {c: tokenizer.encode(c) for c in "xSTOPy"}
    assert stream.push(letter["x"]) == "x"
    assert stream.push(letter["S"] + letter["T"]) == ""
    assert stream.push(letter["y"]) == "STy"
    assert stream.push(letter["S"] + letter["T"] + letter["O"] + letter["P"] + letter["x"]) == ""
    assert stream.stopped == "STOP" and stream.text == "xSTy" and stream.tokens == 8
    assert stream.push(letter["x"]) == "" and stream.finish() == ""


def test_a_leading_space_stays(tmp_path) -> None:
    tokenizer = toys.save(toys.sentencepiece_like(), tmp_path)
    stream = TextStream(tokenizer)
    hello = tokenizer.id_of("▁hello")
    assert [stream.push([hello]), stream.push([hello])] == ["hello", " hello"]


def test_an_unfinished_character_waits(tmp_path) -> None:
    tokenizer = toys.save(toys.byte_level(), tmp_path)
    ids = [tokenizer.id_of(c) for c in ("ð", "Ł", "Ļ", "Ģ")]  # 🙀, byte by byte
    stream = TextStream(tokenizer)
    assert [stream.push([token]) for token in ids[:3]] == ["", "", ""]
    assert stream.push(ids[3:]) == "🙀"
    cut = TextStream(tokenizer)
    assert cut.push(ids[:3]) == "" and cut.finish() == "�"


def test_stops_do_not_count_among_the_first_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ab") * 3
    early = len(ids) // 3
    stream = TextStream(tokenizer, stop=["b"], min_tokens=early)
    assert stream.push(ids[:early]).endswith("b") and stream.stopped is None
    stream.push(ids[early:])
    assert stream.stopped == "b" and stream.tokens <= 2 * early
