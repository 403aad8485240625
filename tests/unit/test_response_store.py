"""The answers that are kept: so many, so large, so old, and each owner's his own."""

from __future__ import annotations

import pytest

from twofold.core import CapacityError
from twofold.serve.config import Limits
from twofold.serve.errors import HttpError
from twofold.serve.responses import store as stores
from twofold.serve.responses.shapes import OutputMessage, OutputText, Response
from twofold.serve.responses.store import Kept, Store


def kept(name: str, owner: str = "me", status: str = "completed", size: int = 0) -> Kept:
    output = [OutputMessage("m", content=[OutputText(text="x" * size)])]
    response = Response(id=name, created_at=1, model="m", status=status, output=output)
    return Kept(owner, response, [], [{"role": "user", "content": "hi"}])


def names(store: Store, *candidates: str) -> str:
    found = ""
    for name in candidates:
        try:
            found += store.get("me", name).response.id
        except HttpError as error:
            assert error.status == 404
    return found


def test_the_oldest_go_when_there_are_too_many() -> None:
    store = Store(Limits(responses=3))
    for name in "abcde":
        store.put(kept(name))
    assert names(store, *"abcde") == "cde" and len(store) == 3


def test_what_is_being_written_stays_and_too_much_of_it_is_refused() -> None:
    store = Store(Limits(responses=2))
    store.put(kept("a", status="in_progress"))
    store.put(kept("b"))
    store.put(kept("c", status="queued"))
    assert names(store, *"abc") == "ac"
    with pytest.raises(CapacityError):
        store.put(kept("d"))
    assert names(store, *"acd") == "ac"


def test_bytes_are_counted_when_an_answer_has_grown() -> None:
    store = Store(Limits(response_bytes=20_000))
    for name in "abc":
        store.put(kept(name, size=4000))
    grown = kept("d", status="in_progress")
    store.put(grown)
    assert names(store, *"abcd") == "abcd"
    grown.response.output = kept("x", size=10_000).response.output
    grown.response.status = "completed"
    store.weigh(grown)
    assert names(store, *"abcd") == "cd"
    store.delete(grown)
    store.weigh(grown)  # one that is gone counts nothing
    for name in "efgh":
        store.put(kept(name, size=4000))
    assert names(store, *"efgh") == "efgh"


def test_the_old_go_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(stores.time, "monotonic", lambda: now[0])
    store = Store(Limits(response_seconds=10))
    store.put(kept("a"))
    now[0] += 6
    store.put(kept("b"))
    assert names(store, *"ab") == "ab"
    now[0] += 6
    assert names(store, *"ab") == "b"


def test_nobody_finds_what_is_anothers() -> None:
    store = Store(Limits())
    store.put(kept("a", owner="another"))
    with pytest.raises(HttpError):
        store.get("me", "a")
    asked, answer = {"role": "user", "content": "hi"}, {"role": "assistant", "content": ""}
    assert store.get("another", "a").next_turn() == [asked, answer]
