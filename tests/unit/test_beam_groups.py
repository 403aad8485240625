"""Beam groups under a fake runner: each search is that of the history alone, whatever runs beside it or is lost."""

import itertools
import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.fake_runner import VOCAB, Bench, ask, expected, options
from twofold.core import CapacityError, RequestError
from twofold.engine.beams import Search
from twofold.engine.plan import StepPlan
from twofold.engine.request import State, TokenOut

EOS = 0


def beams(name, prompt, max_tokens=8, *, width=3, **more):
    return ask(name, prompt, max_tokens, temperature=0.0, use_beam_search=True, beam_width=width, **more)


def searched(request, eos=(EOS,)):
    """The same search without an engine: sequences of ids and their scores."""
    params = request.params
    eos = () if params.ignore_eos else eos
    ends = frozenset({*eos, *params.stop_token_ids})
    search = Search(params, ends=ends, stops=frozenset(params.stop_token_ids), room=params.max_tokens)
    going = True
    while going:
        count = params.width + len({*eos, *params.stop_token_ids})
        found = [options([*request.prompt_ids, *path.ids], count) for path in search.live]
        going = search.advance([[(value, TokenOut(token)) for token, value in each] for each in found])
    return [([t.id for t in beam.tokens], beam.score) for beam in search.done[: params.n]]


def told(bench, name):
    last = bench.outputs[name][-1]
    return [([t.id for t in beam.tokens], beam.score) for beam in last.beams]


def test_a_search_is_that_of_the_history_alone():
    bench = Bench(eos_ids=(EOS,), budget=12, max_num_seqs=16)
    asked = [beams(f"b{i}", range(1, 4 + 5 * i), width=2 + i, n=2) for i in range(4)]
    for request in asked:
        bench.submit(request)
    bench.submit(ask("plain", range(30, 39), 12, ignore_eos=True))
    bench.drain()
    for request in asked:
        assert told(bench, request.id) == searched(request)
        assert len(told(bench, request.id)) == 2 and len(bench.outputs[request.id]) == 1
        assert request.output_ids == [] or request.state.finished
    assert bench.tokens("plain") == expected(tuple(range(30, 39)), 12)


def test_the_prompt_is_computed_once_and_its_blocks_are_shared():
    bench = Bench(block_size=4, budget=64)
    bench.submit(beams("b", range(1, 42), 6, width=4, ignore_eos=True))
    bench.step()
    most = 0
    while bench.scheduler.has_work:
        bench.step()
        most = max(most, bench.pool.used)
        bench.scheduler.check_integrity()
    assert bench.runner.computed == 41 + 4 * 5
    assert most <= 10 + 4 * 2, "ten full blocks of the prompt are held once"


def test_a_block_is_copied_only_when_two_write_into_it():
    bench = Bench(block_size=4, budget=64)
    bench.submit(beams("b", range(1, 9), 10, width=3, ignore_eos=True))
    copies = []
    while bench.scheduler.has_work:
        plan = bench.step()
        copies += plan.copies
        written = {chunk.blocks[chunk.start // 4] for chunk in plan.chunks}
        assert len(written) == len(plan.chunks), "no two rows write into one block"
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(plan), type=StepPlan) == plan
    assert 0 < len(copies) < 3 * 9


@pytest.mark.parametrize("caching", [True, False])
def test_a_preempted_group_goes_as_a_whole_and_ends_the_same(caching):
    bench = Bench(num_blocks=21, block_size=2, max_model_len=48, caching=caching, max_num_seqs=12)
    asked = [beams(f"b{i}", [i + 1] * 5, 12, width=3, early_stopping="never", ignore_eos=True) for i in range(4)]
    for request in asked:
        bench.submit(request)
    bench.drain()
    assert bench.scheduler.preemptions > 0
    for request in asked:
        assert told(bench, request.id) == searched(request)


def test_a_group_that_waits_again_computes_what_its_beams_share_once():
    bench = Bench(block_size=2, caching=False, budget=64)
    request = beams("b", range(1, 12), 12, width=3, ignore_eos=True)
    bench.submit(request)
    for _ in range(8):
        bench.step()
    paths = [path.ids for path in bench.scheduler.running[0].search.live]
    bench.scheduler.preempt_all()
    bench.scheduler.check_integrity()
    common = len(list(itertools.takewhile(lambda ids: len(set(ids)) == 1, zip(*paths))))
    before = bench.runner.computed
    bench.step()
    assert request.state is State.RUNNING and bench.runner.computed - before == 11 + common
    bench.drain()
    assert told(bench, "b") == searched(request)


def test_abort_and_deadline_free_every_block():
    now = [0.0]
    bench = Bench(budget=64, clock=lambda: now[0])
    bench.submit(beams("a", range(1, 9), 30, ignore_eos=True))
    bench.submit(beams("d", range(2, 9), 30, ignore_eos=True, deadline=5.0))
    for _ in range(4):
        bench.step()
    bench.scheduler.abort("a")
    bench.scheduler.check_integrity()
    now[0] = 6.0
    bench.scheduler.expire()
    bench.collect()
    assert bench.pool.used == 0 and not bench.scheduler.has_work
    assert (bench.finish("a"), bench.finish("d")) == (State.ABORT, State.TIMEOUT)


def test_what_beams_wrote_is_found_again():
    bench = Bench(block_size=4, budget=64)
    bench.submit(beams("b", range(1, 9), 10, ignore_eos=True))
    bench.drain()
    best = told(bench, "b")[0][0]
    again = bench.submit(ask("again", (*range(1, 9), *best), 1))
    bench.drain()
    assert again.num_cached >= 16
    same = bench.submit(beams("c", range(1, 9), 10, ignore_eos=True))
    bench.drain()
    assert same.num_cached == 4 and told(bench, "c") == told(bench, "b")


def test_seats_and_blocks_bound_a_search():
    bench = Bench(num_blocks=12, block_size=4, max_num_seqs=4, max_model_len=100)
    with pytest.raises(RequestError) as caught:
        bench.submit(beams("wide", [1] * 4, 4, width=5))
    assert caught.value.param == "beam_width"
    with pytest.raises(CapacityError) as full:
        bench.submit(beams("long", [1] * 4, 40, width=4))
    assert "4 beams" in str(full.value) and "max_tokens to 9" in str(full.value)
    fits = bench.submit(beams("fits", [1] * 4, 9, width=4, ignore_eos=True))
    bench.submit(ask("beside", [2] * 4, 3))
    bench.step()
    assert [row.request.id for row in bench.scheduler.running] == ["fits"], "all seats are taken"
    bench.drain()
    assert told(bench, "fits") == searched(fits)


def test_stops_of_both_kinds_are_told_apart():
    bench = Bench(eos_ids=(EOS,))
    some = [token for token, _ in options([1, 2, 3], 4)]
    request = beams("b", [1, 2, 3], 6, width=3, n=3, stop_token_ids=tuple(some[1:]))
    bench.submit(request)
    bench.drain()
    found = bench.outputs["b"][-1].beams
    assert {beam.finish for beam in found} & {State.STOP}
    for beam in found:
        last = beam.tokens[-1].id
        assert beam.stop_reason == (last if last in some[1:] else None)


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32), caching=st.booleans(), policy=st.sampled_from(["fcfs", "priority"]))
def test_any_sequence_of_operations_keeps_every_search_and_every_block(seed, caching, policy):
    rng = random.Random(seed)
    now = [0.0]
    bench = Bench(
        num_blocks=rng.randint(14, 40),
        block_size=rng.choice([1, 2, 4]),
        max_model_len=32,
        caching=caching,
        max_num_seqs=rng.randint(4, 9),
        budget=rng.randint(9, 24),
        policy=policy,
        clock=lambda: now[0],
        eos_ids=(EOS,),
    )
    requests = {}
    for _ in range(60):
        verb = rng.random()
        if verb < 0.35:
            shared = [1, 2, 3, 4, 5, 6, 7, 8, 9][: rng.randint(1, 9)]
            prompt = (*shared, *(rng.randrange(3) for _ in range(rng.randint(0, 4))))
            common = {
                "priority": rng.randint(0, 2),
                "deadline": now[0] + rng.randint(1, 30) if rng.random() < 0.2 else None,
            }
            name, most = f"r{len(requests)}", rng.randint(1, 12)
            if rng.random() < 0.5:
                early = rng.choice([True, False, "never"])
                request = beams(name, prompt, most, width=rng.randint(1, 4), early_stopping=early, **common)
            else:
                request = ask(name, prompt, most, **common)
            try:
                bench.submit(request)
            except CapacityError:
                continue
            requests[request.id] = request
        elif verb < 0.45 and requests:
            bench.scheduler.abort(rng.choice(list(requests)))
        elif verb < 0.48:
            bench.scheduler.preempt_all()
        elif verb < 0.49:
            bench.scheduler.set_version(bench.scheduler.version + 1)
        elif bench.scheduler.has_work:
            plan = bench.step()
            assert plan.num_tokens <= bench.scheduler.budget
            now[0] += 1.0
        bench.scheduler.check_integrity()
    bench.drain()
    for name, request in requests.items():
        end = bench.finish(name)
        if end not in (State.STOP, State.LENGTH):
            continue
        if request.params.use_beam_search:
            assert told(bench, name) == searched(request)
        else:
            text = expected(request.prompt_ids, request.params.max_tokens)
            assert bench.tokens(name) == (text[: text.index(EOS) + 1] if EOS in text else text)


def test_the_vocabulary_holds_what_the_fake_answers():
    assert all(0 <= token < VOCAB for token, _ in options([1], 8)) and len(options([1], 8)) == 8
