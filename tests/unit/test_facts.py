"""What an engine says of a request besides its tokens: why it waited, how often it gave way, how its guesses went."""

from __future__ import annotations

import pytest
from fake_runner import Bench, FakeRunner, ask

from twofold.engine.blocks import BlockPool
from twofold.engine.facts import Facts, Waits
from twofold.engine.limits import Limits
from twofold.engine.request import Output, Request
from twofold.engine.sampling import SamplingParams
from twofold.engine.scheduler import Scheduler
from twofold.engine.tiers import HostTier
from twofold.serve.fate import Fate


class World:
    """A scheduler whose steps take a second each, and what it told of each request last."""

    def __init__(self, *, blocks: int = 64, seqs: int = 8, budget: int = 64) -> None:
        self.now = 0.0
        self.pool = BlockPool(blocks, 4)
        limits = Limits(max_model_len=64, vocab=100, cache_tokens=blocks * 4, block_size=4, max_seqs=seqs)
        self.scheduler = Scheduler(
            self.pool, limits, max_num_seqs=seqs, max_num_batched_tokens=budget, clock=lambda: self.now
        )
        self.waits = Waits(lambda: self.now)
        self.runner = FakeRunner(blocks, 4)
        self.facts: dict[str, Facts] = {}
        self.ended: list[str] = []

    def submit(self, name: str, prompt: int = 4, tokens: int = 4, first: int = 1) -> Request:
        ids = tuple(first + i % 50 for i in range(prompt))
        request = Request(id=name, prompt_ids=ids, params=SamplingParams(max_tokens=tokens, ignore_eos=True), seed=1)
        self.scheduler.submit(request)
        self.waits.enter(request)
        return request

    def step(self) -> list[Output]:
        plan = self.scheduler.plan()
        self.waits.saw(self.scheduler)
        self.now += 1.0
        self.scheduler.apply(self.runner.execute(plan))
        outputs = self.scheduler.take()
        self.waits.told(outputs)
        for output in outputs:
            if output.facts is not None:
                self.facts[output.request_id] = output.facts
            if output.finish is not None:
                self.ended.append(output.request_id)
        return outputs

    def run(self) -> None:
        while self.scheduler.has_work:
            self.step()


def test_who_did_not_wait_is_told_nothing() -> None:
    world = World()
    world.submit("a")
    world.run()
    assert world.ended == ["a"] and world.facts == {}


def test_a_request_waits_for_a_seat_and_says_how_long() -> None:
    world = World(seqs=1)
    world.submit("a", tokens=5)
    world.submit("b", first=20)
    world.run()
    assert world.facts == {"b": Facts(waits={"seats": 5.0})}


def test_a_request_waits_for_blocks() -> None:
    world = World(blocks=6)
    world.submit("a", prompt=16, tokens=4)
    world.step()
    world.submit("b", prompt=16, first=30)
    world.run()
    assert list(world.facts["b"].waits) == ["cache"]
    assert world.facts["b"].waits["cache"] >= 3.0


def test_a_request_waits_for_the_budget_of_steps() -> None:
    world = World(budget=8)
    world.submit("a", prompt=32)
    world.submit("b", first=60)
    world.run()
    assert world.facts["b"].waits == {"budget": pytest.approx(3.0, abs=1.0)}


def test_a_request_waits_for_a_prefix_that_is_being_computed() -> None:
    world = World(budget=40)
    for name in ("a", "b"):
        world.submit(name, prompt=33, tokens=2)
    world.run()
    assert world.facts == {"b": Facts(waits={"prefix": 1.0})}


def test_preemption_is_counted_and_its_wait_named() -> None:
    world = World(blocks=8, seqs=4)
    for name in ("a", "b"):
        world.submit(name, prompt=8, tokens=16, first=1 if name == "a" else 40)
    world.run()
    assert world.scheduler.preemptions > 0
    hit = [facts for facts in world.facts.values() if facts.preemptions]
    assert sum(facts.preemptions for facts in hit) == world.scheduler.preemptions
    assert all(facts.waits["preempted"] >= 1.0 for facts in hit)


def test_tokens_of_a_tier_are_told_by_its_name() -> None:
    bench = Bench(num_blocks=12, tiers=[HostTier(1 << 16)])
    prompt = tuple(range(1, 17))
    bench.submit(ask("cold", prompt))
    bench.drain()
    for number in range(6):
        bench.submit(ask(f"fill{number}", tuple(range(20 + number, 36 + number)), 2))
    bench.drain()
    warm = bench.submit(ask("warm", prompt))
    bench.drain()
    assert warm.tiers == {"host": warm.num_cached} != {"host": 0}
    assert warm.told.tiers == warm.tiers


def test_nothing_is_kept_of_those_that_ended() -> None:
    world = World(seqs=1)
    for number in range(4):
        world.submit(str(number), first=1 + number)
    world.step()
    world.scheduler.abort("2")
    world.run()
    assert sorted(world.ended) == ["0", "1", "2", "3"]
    assert world.waits._entered == {} and world.waits._held == {}


def test_the_facts_of_two_processes_are_added() -> None:
    fate = Fate()
    fate.start()
    fate.hear(Facts(1, 10, 4, {"seats": 1.0}))
    fate.hear(Facts(2, 12, 5, {"seats": 1.0}))  # it tells of all since it has the request
    fate.die()
    fate.start()
    fate.hear(Facts(0, 8, 8, {"seats": 0.5, "cache": 2.0}))
    assert fate.facts == Facts(2, 20, 13, {"seats": 1.5, "cache": 2.0})
    assert fate.deaths == 1 and fate.lost >= 0.0
