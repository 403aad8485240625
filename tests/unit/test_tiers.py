"""Tiers behind the pool, under the fake runner: what was forgotten is found again, and no storage can hurt a text."""

import random
from concurrent.futures import Future

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.fake_runner import VOCAB, Bench, ask, expected
from twofold.core import CapacityError, RequestError
from twofold.engine.blocks import block_name
from twofold.engine.request import State
from twofold.engine.tiers import HostTier


class SlowTier(HostTier):
    """As the host's, but what is asked for comes when the test says so, or not at all. It takes blocks at once."""

    name = "slow"
    full = False

    def __init__(self, most_bytes=1 << 20):
        super().__init__(most_bytes)
        self.asked = []

    def wants(self, name, leaving):
        return not self.lookup(name)

    def load(self, name):
        future = Future()
        self.asked.append((future, self._kept[name[0]][1]))
        return future

    def come(self, *, broken=False):
        """Everything that was asked for comes now."""
        asked, self.asked = self.asked, []
        for future, content in asked:
            future.set_result(None if broken else content)


class BrokenTier(SlowTier):
    """Every read of it ends well, badly, late or never, as `rng` says."""

    name = "broken"

    def __init__(self, rng, most_bytes):
        super().__init__(most_bytes)
        self.rng = rng

    def wants(self, name, leaving):
        return super().wants(name, leaving) and self.rng.random() < 0.8

    def load(self, name):
        future = super().load(name)
        if self.rng.random() < 0.5:
            self.asked.pop()
            future.set_result(self._kept[name[0]][1] if self.rng.random() < 0.7 else None)
        return future

    def come(self, *, broken=False):
        self.rng.shuffle(self.asked)
        while self.asked and self.rng.random() < 0.6:
            future, content = self.asked.pop()
            future.set_result(content if self.rng.random() < 0.8 else None)


def prompt_of(number, length=16):
    return tuple((number * 13 + j) % VOCAB for j in range(length))


def fill(bench, count=6, first=50):
    """Others' prompts, so that the pool forgets what it had."""
    for number in range(first, first + count):
        bench.submit(ask(f"fill{number}", prompt_of(number), 2))
    bench.drain()


def forget(bench, count=6):
    """A first prompt is computed, and the pool forgets it."""
    bench.submit(ask("cold", prompt_of(1)))
    bench.drain()
    fill(bench, count)


def test_what_the_pool_forgot_is_found_in_host_memory():
    bench = Bench(num_blocks=12, tiers=[HostTier(1 << 16)])
    forget(bench)
    computed = bench.runner.computed
    warm = bench.submit(ask("warm", prompt_of(1)))
    bench.drain()
    assert bench.tokens("warm") == bench.tokens("cold") == expected(prompt_of(1), 5)
    assert warm.num_cached == 12 and bench.runner.computed - computed == 4 + 4
    assert (bench.tiers.queries - bench.tiers.hits, bench.tiers.hits) == (16 * 7 + 4, 12)
    assert bench.pool.hits == 0, "the pool's own hits are counted apart"
    assert bench.tiers.counters()["host"]["loaded_bytes"] == 12 * 4


def test_without_a_tier_it_is_computed_again():
    bench = Bench(num_blocks=12)
    forget(bench)
    assert bench.submit(ask("warm", prompt_of(1))).num_cached == 0
    bench.drain()


def test_a_request_waits_for_a_slow_tier_and_holds_up_nobody():
    slow = SlowTier()
    bench = Bench(num_blocks=12, tiers=[slow])
    forget(bench)
    late = bench.submit(ask("late", prompt_of(1), 3))
    bench.submit(ask("other", prompt_of(2, 6), 3))
    for _ in range(4):
        bench.step()
        bench.scheduler.check_integrity()
    assert bench.finish("other") is State.LENGTH and late.state is State.WAITING
    assert not bench.step().chunks, "nothing is left to do but to wait"
    slow.come()
    bench.drain()
    assert late.num_cached == 12 and bench.tokens("late") == expected(prompt_of(1), 3)


@pytest.mark.parametrize("how", ["broken", "late"])
def test_what_does_not_come_is_computed(how):
    now = [0.0]
    slow = SlowTier()
    bench = Bench(num_blocks=12, tiers=[slow], patience=2.0, clock=lambda: now[0])
    forget(bench)
    request = bench.submit(ask("again", prompt_of(1)))
    bench.step()
    if how == "broken":
        slow.come(broken=True)
    else:
        now[0] = 2.5
    bench.drain()
    assert request.num_cached == 0 and bench.tokens("again") == expected(prompt_of(1), 5)
    assert slow.errors == (how == "late")
    if how == "late":
        fill(bench)
        assert bench.submit(ask("third", prompt_of(1))) and bench.step().chunks, "a tier that hangs is left alone"
        slow.come()
        bench.drain()


def test_requests_with_one_prefix_read_it_once():
    slow = SlowTier()
    bench = Bench(num_blocks=20, tiers=[slow])
    forget(bench, 10)
    for name in ("a", "b", "c"):
        bench.submit(ask(name, prompt_of(1), 3))
    bench.step()
    slow.come()
    bench.drain()
    assert bench.tiers.found["slow"] == 12 and bench.pool.hits == 24
    assert all(bench.tokens(name) == expected(prompt_of(1), 3) for name in ("a", "b", "c"))


def test_a_longer_request_gets_its_own_blocks_behind_those_that_another_landed():
    slow = SlowTier()
    bench = Bench(num_blocks=40, tiers=[slow])
    bench.submit(ask("cold", prompt_of(1, 40), 2))
    bench.drain()
    bench.pool.forget_all()
    bench.submit(ask("short", prompt_of(1, 20), 2))
    longer = bench.submit(ask("long", prompt_of(1, 40), 2))
    bench.step()
    slow.come()
    bench.drain()
    assert longer.num_cached == 36 and bench.pool.hits == 16 + 4, "the next one the other computed meanwhile"
    assert bench.tiers.found["slow"] == 16 + 16


def test_what_a_full_queue_leaves_waits_in_the_pool():
    """A long prompt is published at once; its blocks go when there is room, or when the pool forgets them."""
    slow = SlowTier()
    slow.full = True
    bench = Bench(num_blocks=24, budget=64, tiers=[slow])
    bench.submit(ask("cold", prompt_of(1, 48), 2))
    bench.drain()
    assert bench.tiers.behind and not slow.held_bytes
    slow.full = False
    bench.flush()
    assert not bench.tiers.behind and slow.held_bytes == 12 * 16
    slow.full = True
    bench.submit(ask("more", prompt_of(2, 48), 2))
    bench.drain()
    bench.pool.forget_all()
    slow.full = False
    bench.flush()
    assert not bench.tiers.behind and slow.held_bytes == 12 * 16, "what the pool has no more is not stored"


def test_a_preempted_request_loads_what_it_had_computed():
    bench = Bench(num_blocks=10, block_size=4, max_model_len=40, tiers=[HostTier(1 << 16)])
    for i in range(5):
        bench.submit(ask(f"r{i}", prompt_of(i, 6), 25))
    bench.drain()
    assert bench.scheduler.preemptions > 0 and bench.tiers.found["host"] > 0
    for i in range(5):
        assert bench.tokens(f"r{i}") == expected(prompt_of(i, 6), 25)


def test_a_request_that_leaves_while_it_loads_leaves_nothing_behind():
    slow = SlowTier()
    bench = Bench(num_blocks=12, tiers=[slow])
    forget(bench)
    bench.submit(ask("gone", prompt_of(1)))
    bench.step()
    assert bench.tiers.loading
    bench.scheduler.abort("gone")
    assert not bench.tiers.loading
    bench.scheduler.check_integrity()
    slow.come()
    bench.drain()


def test_what_is_read_and_not_yet_in_the_pool_is_bounded(monkeypatch):
    slow = SlowTier()
    bench = Bench(num_blocks=60, max_num_seqs=20, tiers=[slow])
    for i in range(8):
        bench.submit(ask(f"cold{i}", prompt_of(i), 2))
    bench.drain()
    bench.pool.forget_all()
    monkeypatch.setattr("twofold.engine.tiers.STAGED_BYTES", 7 * 16)
    monkeypatch.setattr("twofold.engine.tiers.PIECE_BYTES", 2 * 16)
    for i in range(8):
        bench.submit(ask(f"warm{i}", prompt_of(i), 2))
    most = 0
    while bench.scheduler.has_work:
        bench.step()
        most = max(most, len(slow.asked))
        slow.come()
    assert 2 <= most <= 8 and bench.tiers.found["slow"] == 8 * 12
    assert all(bench.tokens(f"warm{i}") == expected(prompt_of(i), 2) for i in range(8))


def test_new_weights_find_nothing_of_the_old():
    host = HostTier(1 << 16)
    bench = Bench(num_blocks=12, tiers=[host])
    forget(bench)
    bench.scheduler.set_version(1)
    bench.tiers.forget()
    assert host.held_bytes == 0
    assert bench.submit(ask("warm", prompt_of(1))).num_cached == 0
    bench.drain()
    assert bench.tiers.hits == 0


def test_salts_keep_tenants_apart():
    bench = Bench(num_blocks=12, tiers=[HostTier(1 << 16)])
    bench.submit(ask("mine", prompt_of(1), salt="a"))
    bench.drain()
    fill(bench)
    other = bench.submit(ask("other", prompt_of(1), salt="b"))
    bench.drain()
    assert other.num_cached == 0 and bench.tiers.hits == 0


def test_host_memory_is_bounded_and_the_longest_unused_goes_first():
    host = HostTier(3 * 16)
    names = [block_name(b"root", (i, i, i, i)) for i in range(5)]
    for name in names[:3]:
        host.store(name, memoryview(bytearray(16)))
    assert host.load(names[0]).result() is not None
    host.store(names[3], memoryview(bytearray(16)))
    assert [host.lookup(name) for name in names] == [True, False, True, True, False]
    assert host.held_bytes == 48 and host.stored_bytes == 64
    host.store(names[4], memoryview(bytearray(64)))
    assert not host.lookup(names[4]) and host.held_bytes == 48, "one that is larger than all of it stays out"


def test_a_collision_of_digests_is_no_hit():
    host = HostTier(64)
    digest, tokens = block_name(b"root", (1, 2, 3, 4))
    host.store((digest, tokens), memoryview(bytearray(16)))
    other = (digest, block_name(b"root", (1, 2, 3, 5))[1])
    assert not host.lookup(other) and host.load(other).result() is None


def beams_of(bench, name):
    return bench.outputs[name][-1].beams


def alone(request):
    """The beams of the same request by itself."""
    bench = Bench(num_blocks=200, block_size=1, max_model_len=32, eos_ids=(0,))
    params = request.params
    bench.submit(ask("alone", request.prompt_ids, params.max_tokens, use_beam_search=True, n=2, temperature=0.0))
    bench.drain()
    return beams_of(bench, "alone")


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    caching=st.booleans(),
    chunked=st.booleans(),
    policy=st.sampled_from(["fcfs", "priority"]),
)
def test_any_sequence_over_any_storage_keeps_every_text_and_every_block(seed, caching, chunked, policy):
    rng, now = random.Random(seed), [0.0]
    size = rng.choice([1, 2, 4])
    broken = BrokenTier(rng, rng.choice([8, 40, 400]) * size * 4)
    tiers = rng.choice([[broken], [HostTier(rng.choice([5, 50]) * size * 4), broken]])
    bench = Bench(
        num_blocks=rng.randint(8, 24) if size > 1 else rng.randint(32, 40),
        block_size=size,
        max_model_len=32,
        caching=caching,
        max_num_seqs=rng.randint(1, 6),
        budget=rng.randint(6, 24) if chunked else 32,
        chunked=chunked,
        policy=policy,
        clock=lambda: now[0],
        eos_ids=(0,),
        tiers=tiers,
        patience=3.0,
    )
    requests = {}
    for turn in range(400):
        verb = rng.random() if turn < 60 else 1.0
        if verb < 0.35:
            shared = [1, 2, 3, 4, 5, 6, 7, 8, 9][: rng.randint(1, 9)]
            prompt = (*shared, *(rng.randrange(3) for _ in range(rng.randint(0, 4))))
            beams = {"use_beam_search": True, "n": 2, "temperature": 0.0} if rng.random() < 0.1 else {}
            request = ask(f"r{len(requests)}", prompt, rng.randint(1, 12), priority=rng.randint(0, 2), **beams)
            try:
                bench.submit(request)
            except (CapacityError, RequestError):
                continue
            requests[request.id] = request
        elif verb < 0.45 and requests:
            bench.scheduler.abort(rng.choice(list(requests)))
        elif verb < 0.47:
            bench.scheduler.preempt_all()
        elif verb < 0.49:
            bench.pool.forget_all()
        elif bench.scheduler.has_work:
            broken.full = rng.random() < 0.3
            bench.step()
            broken.come()
            now[0] += 1.0
        bench.scheduler.check_integrity()
    assert not bench.scheduler.has_work and bench.pool.used == 0
    assert 0 <= bench.pool.hits <= bench.pool.queries and 0 <= bench.tiers.hits <= bench.tiers.queries
    assert caching or not bench.tiers.found["broken"]
    for name, request in requests.items():
        if request.params.use_beam_search:
            assert bench.finish(name) is State.ABORT or beams_of(bench, name) == alone(request)
            continue
        text = expected(request.prompt_ids, request.params.max_tokens)
        text = text[: text.index(0) + 1] if 0 in text else text
        got = bench.tokens(name)
        assert got == text[: len(got)]
        if bench.finish(name) in (State.STOP, State.LENGTH):
            assert got == text
