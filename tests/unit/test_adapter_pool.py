"""Which adapter gets a slot, what is evicted, and that nobody waits for ever: the scheduler with a shelf of names."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fake_runner import FakeRunner

from twofold.core import CapacityError, CheckpointError, RequestError
from twofold.engine.adapters import AdapterPool
from twofold.engine.blocks import BlockPool
from twofold.engine.limits import Limits
from twofold.engine.request import Output, Request, State
from twofold.engine.sampling import SamplingParams
from twofold.engine.scheduler import Scheduler


@dataclass
class Held:
    nbytes: int
    digest: str
    rank: int = 4
    base: str = ""


class Shelf:
    """Directories are names, `disk` says what lies there: (bytes, content)."""

    def __init__(self, count: int, disk: dict[str, tuple[int, str]]) -> None:
        self.count, self.disk = count, disk
        self.slots: list[Any] = [None] * count
        self.reads: list[str] = []

    def read(self, path: str | Path, most_bytes: int) -> Held:
        if str(path) not in self.disk:
            raise CheckpointError(f"{path} is gone")
        nbytes, content = self.disk[str(path)]
        if nbytes > most_bytes:
            raise CapacityError(f"{path} is too large")
        self.reads.append(str(path))
        return Held(nbytes, content)

    def put(self, slot: int, adapter: Any) -> None:
        self.slots[slot] = adapter


class Stand:
    """A scheduler, its pool of adapters and a runner that draws hashes."""

    def __init__(self, slots: int = 2, bytes_: int = 100, held: int | None = None) -> None:
        self.disk = {name: (10, name) for name in "abcd"}
        self.shelf = Shelf(slots, self.disk)
        self.pool = AdapterPool(self.shelf, most_bytes=bytes_, most_held=held)
        for name in self.disk:
            self.pool.load(name, name)
        limits = Limits(max_model_len=512, vocab=97, cache_tokens=200 * 16)
        self.scheduler = Scheduler(
            BlockPool(200, 16, caching=True),
            limits,
            max_num_seqs=8,
            max_num_batched_tokens=64,
            adapters=self.pool,
        )
        self.runner = FakeRunner(200, 16)
        self.ends: dict[str, Output] = {}
        self.slots_of: dict[str, set[int]] = {}

    def submit(self, name: str, adapter: str = "", tokens: int = 4) -> Request:
        request = Request(
            id=name, prompt_ids=(1, 2, len(self.ends) + 3), params=SamplingParams(max_tokens=tokens), adapter=adapter
        )
        self.scheduler.submit(request)
        return request

    def step(self) -> set[str]:
        """One step; the names of those that ran."""
        plan = self.scheduler.plan()
        rows = {row.serial: row for row in self.scheduler.running}
        ran = set()
        for chunk in plan.chunks:
            row = rows[chunk.serial]
            ran.add(row.request.id)
            held = self.shelf.slots[chunk.adapter - 1] if chunk.adapter else None
            assert (held.digest if held else "") == row.request.adapter.partition("@")[2]
        if plan.chunks:
            self.scheduler.apply(self.runner.execute(plan))
        for output in self.scheduler.take():
            if output.finish is not None:
                self.ends[output.request_id] = output
        self.scheduler.check_integrity()
        return ran

    def finish(self) -> None:
        while self.scheduler.has_work:
            self.step()


def test_who_has_no_slot_waits_and_holds_up_nobody() -> None:
    stand = Stand(slots=2)
    for name, adapter in (("1", "a"), ("2", "b"), ("3", "c"), ("4", ""), ("5", "a")):
        stand.submit(name, adapter)
    assert stand.step() == {"1", "2", "4"}, "3 waits for a slot, which 5 would keep from it"
    assert stand.pool.running == ("a", "b") and stand.pool.waiting == ("a", "c")
    stand.finish()
    assert all(end.finish is State.LENGTH for end in stand.ends.values()) and len(stand.ends) == 5


def test_those_of_an_undrained_slot_pass_who_waits() -> None:
    stand = Stand(slots=2)
    for name, adapter in (("1", "a"), ("2", "a"), ("3", "b"), ("4", "c"), ("5", "a"), ("6", "b")):
        stand.submit(name, adapter)
    assert stand.step() == {"1", "2", "3", "5"}, "b has fewest: it is drained for 4, and 6 waits behind that"
    stand.finish()
    assert len(stand.ends) == 6


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_nobody_starves_under_a_stream_of_others(slots: int) -> None:
    stand, rng = Stand(slots=slots), random.Random(slots)
    for i in range(3 * slots):
        stand.submit(f"before{i}", "abd"[i % slots], tokens=rng.randint(2, 9))
    stand.step()
    stand.submit("late", "c")
    for i in range(300):
        stand.submit(f"more{i}", "abd"[i % slots], tokens=rng.randint(2, 9))
        stand.step()
        if "late" in stand.ends:
            break
    assert "late" in stand.ends and i < 40
    stand.finish()


def test_random_lives_keep_every_account() -> None:
    for seed in range(12):
        rng = random.Random(seed)
        stand = Stand(slots=rng.randint(1, 3), bytes_=rng.choice([10, 25, 100]), held=rng.choice([None, 3]))
        asked = 0
        for _ in range(120):
            match rng.randrange(8):
                case 0 | 1 | 2:
                    if stand.pool.listed:
                        name = rng.choice([known.name for known in stand.pool.listed] + [""])
                        stand.submit(f"r{asked}", name, tokens=rng.randint(1, 12))
                        asked += 1
                case 3:
                    if asked:
                        stand.scheduler.abort(f"r{rng.randrange(asked)}")
                case 4:
                    if len(stand.pool.listed) > 1:
                        stand.pool.unload(rng.choice(stand.pool.listed).name)
                case 5:
                    name = rng.choice("abcd")
                    stand.disk[name + "2"] = rng.choice([(5, f"{name} small"), (10, f"{name} large"), (10, "any")])
                    stand.pool.load(name, rng.choice([name, name + "2"]), replace=True)
                case 6:
                    stand.scheduler.preempt_all()
                case _:
                    stand.step()
        stand.finish()
        assert asked > 20 and all(output.error is None or "changed" in output.error for output in stand.ends.values())


def test_the_one_left_unused_for_longest_gives_its_slot_and_its_memory() -> None:
    stand = Stand(slots=2, bytes_=30)
    assert stand.shelf.reads == ["a", "b", "c", "d"] and stand.pool.nbytes == 30, "a was evicted for d"
    for name in "bcb":
        stand.submit(name, name)
        stand.finish()
    stand.submit("d", "d")
    stand.finish()
    assert {held.digest for held in stand.shelf.slots} == {"b", "d"}
    assert len(stand.shelf.reads) == 4, "all of these were in memory"
    stand.submit("a", "a")
    stand.finish()
    assert stand.shelf.reads[4:] == ["a"] and {held.digest for held in stand.shelf.slots} == {"a", "d"}
    assert stand.pool.nbytes == 30 and stand.pool.reads == 5


def test_memory_that_runs_hold_is_waited_for() -> None:
    stand = Stand(slots=2, bytes_=10)
    for name in "ab":
        stand.submit(name, name)
    stand.submit("c", "a")
    assert stand.step() == {"a"}
    assert stand.shelf.slots[1] is None
    stand.finish()
    assert len(stand.ends) == 3 and {end.error for end in stand.ends.values()} == {None}


def test_what_changed_on_disk_is_an_error_of_its_requests_alone() -> None:
    stand = Stand(slots=1, bytes_=10)
    stand.disk["a"] = (10, "other")
    del stand.disk["b"]
    for name in "abd":
        stand.submit(name, name)
    stand.finish()
    assert "has changed since" in (stand.ends["a"].error or "") and stand.ends["a"].finish is State.ERROR
    assert "is gone" in (stand.ends["b"].error or "")
    assert stand.ends["d"].finish is State.LENGTH
    stand.pool.load("a", "a", replace=True)
    stand.submit("again", "a")
    stand.finish()
    assert stand.ends["again"].finish is State.LENGTH


def test_names_and_keys() -> None:
    stand = Stand(slots=1)
    for name in ("", "x" * 129, "a@b", " a", "a\n", "\ud800"):
        with pytest.raises(RequestError, match="an adapter's name"):
            stand.pool.load(name, "a")
    with pytest.raises(RequestError, match="already"):
        stand.pool.load("a", "b")
    with pytest.raises(CheckpointError, match="not what was loaded"):
        stand.pool.load("new", "a", "new@other")
    with pytest.raises(RequestError, match="unknown adapter 'e'"):
        stand.submit("r", "e")
    with pytest.raises(RequestError, match="enable-lora"):
        AdapterPool().enter("a")
    with pytest.raises(RequestError, match="enable-lora"):
        AdapterPool().load("a", "a")
    assert AdapterPool().enter("") == ""
    key = stand.pool.key_of("a")
    running = stand.submit("r", "a", tokens=6)
    stand.step()
    stand.pool.unload("a")
    with pytest.raises(RequestError, match="unknown adapter 'a'"):
        stand.submit("s", "a")
    assert running.adapter == key and [known.name for known in stand.pool.listed] == ["b", "c", "d"]
    stand.submit("straggler", key)  # accepted by the front before it was unloaded
    stand.finish()
    assert {end.finish for end in stand.ends.values()} == {State.LENGTH}
    assert stand.pool.nbytes == 30, "its memory is free after them"


def test_one_that_is_told_again_without_being_listed_is_for_stragglers() -> None:
    stand = Stand(slots=1)
    key = stand.pool.key_of("a")
    stand.pool.unload("a")
    stand.pool.load("a", "a", key, listed=False)
    assert [known.name for known in stand.pool.listed] == ["b", "c", "d"] and stand.pool.nbytes == 30
    stand.submit("straggler", key)
    stand.finish()
    assert stand.ends["straggler"].finish is State.LENGTH and stand.pool.nbytes == 30
