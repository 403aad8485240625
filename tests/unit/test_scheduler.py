"""The scheduler under a fake runner: order, budget, preemption, sharing; and any sequence of operations."""

import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.fake_runner import VOCAB, Bench, ask, expected
from twofold.core import CapacityError, StateError
from twofold.engine.plan import StepPlan, StepResult
from twofold.engine.request import State


def test_text_is_that_of_the_history_alone():
    bench = Bench()
    prompts = {f"r{i}": tuple((i * 7 + j) % VOCAB for j in range(3 + 5 * i)) for i in range(6)}
    for name, prompt in prompts.items():
        bench.submit(ask(name, prompt, 9))
    bench.drain()
    for name, prompt in prompts.items():
        assert bench.tokens(name) == expected(prompt, 9)
        assert bench.finish(name) is State.LENGTH


def test_long_prompts_are_cut_and_fused_with_decodes():
    bench = Bench(budget=16)
    bench.submit(ask("short", range(5), 20))
    bench.step()
    bench.submit(ask("long", [(j + 9) % VOCAB for j in range(50)], 2))
    sizes = [sorted(len(chunk.ids) for chunk in bench.step().chunks) for _ in range(4)]
    assert sizes == [[1, 15], [1, 15], [1, 15], [1, 5]]
    assert len(bench.tokens("short")) == 5, "the decode went on in every step"


def test_without_chunks_a_prompt_is_computed_whole_while_decodes_wait():
    bench = Bench(budget=64, chunked=False)
    bench.submit(ask("short", range(5), 20))
    bench.step()
    bench.submit(ask("long", [(j + 9) % VOCAB for j in range(50)], 3))
    bench.submit(ask("other", [(j + 2) % VOCAB for j in range(20)], 3))
    sizes = [sorted(len(chunk.ids) for chunk in bench.step().chunks) for _ in range(3)]
    assert sizes == [[50], [20], [1, 1, 1]], "two prompts do not fit one step, and none is cut"
    bench.drain()
    assert bench.tokens("long") == expected(tuple((j + 9) % VOCAB for j in range(50)), 3)


def test_the_budget_is_never_exceeded_and_always_filled_when_there_is_work():
    bench = Bench(budget=10, num_blocks=200, caching=False)
    for i in range(6):
        bench.submit(ask(f"r{i}", [i] * 17, 3))
    total = [bench.step().num_tokens for _ in range(8)]
    assert max(total) == 10 and total[:7] == [10] * 7


def test_seats_are_limited_and_order_is_kept():
    bench = Bench(max_num_seqs=2, caching=False)
    for i in range(5):
        bench.submit(ask(f"r{i}", [i + 1] * 4, 2))
    order = []
    while bench.scheduler.has_work:
        bench.step()
        assert len(bench.scheduler.running) <= 2
        order += [name for name in bench.outputs if name not in order]
    assert order == [f"r{i}" for i in range(5)]


def test_priority_goes_first_and_fcfs_ignores_it():
    for policy, first in (("priority", "urgent"), ("fcfs", "early")):
        bench = Bench(max_num_seqs=1, policy=policy)
        bench.submit(ask("early", [1] * 4, 2, priority=5))
        bench.submit(ask("urgent", [2] * 4, 2, priority=-1))
        bench.step()
        assert list(bench.outputs) == [first]


def test_preempted_requests_keep_their_text():
    bench = Bench(num_blocks=12, block_size=4, max_model_len=48)
    prompts = {f"r{i}": tuple((i * 11 + j) % VOCAB for j in range(6)) for i in range(5)}
    for name, prompt in prompts.items():
        bench.submit(ask(name, prompt, 25))
    bench.drain()
    assert bench.scheduler.preemptions > 0
    for name, prompt in prompts.items():
        assert bench.tokens(name) == expected(prompt, 25)


def test_the_one_that_loses_least_gives_way():
    bench = Bench(num_blocks=8, block_size=4, max_model_len=32, caching=False)
    old = bench.submit(ask("old", [1] * 4, 26))
    for _ in range(6):
        bench.step()
    young = bench.submit(ask("young", [2] * 4, 26))
    while not bench.scheduler.preemptions:
        bench.step()
    assert young.state is State.PREEMPTED and old.preemptions == 0
    bench.drain()
    assert bench.tokens("young") == expected((2,) * 4, 26)


def test_priority_protects_from_preemption():
    bench = Bench(num_blocks=8, block_size=4, max_model_len=32, caching=False, policy="priority")
    lowly = bench.submit(ask("lowly", [1] * 4, 26, priority=9))
    for _ in range(6):
        bench.step()
    bench.submit(ask("lord", [2] * 4, 26, priority=0))
    while not bench.scheduler.preemptions:
        bench.step()
    assert lowly.state is State.PREEMPTED
    bench.drain()


def test_a_prefix_is_found_again_up_to_the_last_token():
    bench = Bench(block_size=4)
    prompt = tuple(range(16))
    bench.submit(ask("cold", prompt))
    bench.drain()
    warm = bench.submit(ask("warm", prompt))
    plan = bench.step()
    assert [len(chunk.ids) for chunk in plan.chunks] == [4] and warm.num_cached == 12
    longer = bench.submit(ask("longer", (*prompt, 50)))
    bench.step()
    assert longer.num_cached == 16
    bench.drain()
    assert bench.tokens("warm") == bench.tokens("cold") == expected(prompt, 5)
    assert bench.tokens("longer") == expected((*prompt, 50), 5)
    assert (bench.pool.queries, bench.pool.hits) == (16 + 16 + 17, 12 + 16)


def test_answers_are_found_again_too():
    bench = Bench(block_size=4)
    bench.submit(ask("first", range(6), 10))
    bench.drain()
    turn = (*range(6), *bench.tokens("first"), 7, 7)
    second = bench.submit(ask("second", turn))
    bench.drain()
    assert second.num_cached == 12, "the last token of an answer is never computed, so its block is not full"
    assert bench.tokens("second") == expected(turn, 5)


def test_salt_keeps_tenants_apart_and_caching_can_be_off():
    bench = Bench()
    bench.submit(ask("a", range(16), salt="a"))
    bench.drain()
    assert bench.submit(ask("b", range(16), salt="b")).num_cached == 0
    bench.drain()
    assert bench.pool.hits == 0
    off = Bench(caching=False)
    for name in "xy":
        request = off.submit(ask(name, range(16)))
        off.drain()
        assert request.num_cached == 0


def test_simultaneous_samples_compute_their_prompt_once():
    bench = Bench(num_blocks=100, block_size=4, budget=64)
    prompt = tuple(range(41))
    for k in range(8):
        bench.submit(ask(f"s{k}", prompt, 1))
    bench.step()
    assert [row.request.id for row in bench.scheduler.running] == [] and "s0" in bench.outputs
    bench.drain()
    assert bench.runner.computed == 41 + 7
    assert bench.pool.hits == 7 * 40


def test_a_follower_waits_only_as_far_as_it_shares():
    bench = Bench(num_blocks=100, block_size=4, budget=16)
    bench.submit(ask("leader", [j % VOCAB for j in range(64)], 1))
    follower = bench.submit(ask("follower", [*range(8), *[90] * 6], 1))
    other = bench.submit(ask("other", [91] * 3, 1))
    bench.step()
    assert follower.state is State.WAITING and other.state is State.WAITING, "the leader filled the budget"
    bench.step()
    assert follower.state is State.WAITING, "the leader went first again"
    while follower.state is State.WAITING:
        bench.step()
    assert follower.num_cached == 8
    bench.drain()


def test_a_follower_takes_over_when_its_leader_goes():
    bench = Bench(num_blocks=100, block_size=4, budget=16)
    prompt = [j % VOCAB for j in range(64)]
    bench.submit(ask("leader", prompt, 1))
    follower = bench.submit(ask("follower", prompt, 3))
    bench.step()
    assert follower.state is State.WAITING
    bench.scheduler.abort("leader")
    bench.step()
    assert follower.state is State.RUNNING and follower.num_cached == 16
    bench.drain()
    assert bench.tokens("follower") == expected(tuple(prompt), 3)


def test_prompt_scores_survive_preemption():
    bench = Bench(num_blocks=14, block_size=4, max_model_len=50, budget=8)
    for name, token in (("a", 1), ("b", 2)):
        bench.submit(ask(name, [token] * 4, 40))
    bench.step()
    bench.submit(ask("scored", range(20), 6, prompt_logprobs=0))
    bench.drain()
    (prompt,) = [output.prompt for output in bench.outputs["scored"] if output.prompt is not None]
    assert [t.id for t in prompt] == list(range(20))
    assert bench.tokens("scored") == expected(tuple(range(20)), 6)


def test_new_weights_make_old_blocks_unfindable():
    bench = Bench()
    bench.submit(ask("a", range(16), 1))
    bench.drain()
    running = bench.submit(ask("b", range(50, 70), 6))
    bench.step()
    bench.scheduler.set_version(1)
    bench.scheduler.check_integrity()
    assert running.state is State.PREEMPTED and running.num_computed == 0
    again = bench.submit(ask("c", range(16), 1))
    bench.drain()
    assert again.num_cached == 0 and bench.tokens("b") == expected(tuple(range(50, 70)), 6)


def test_a_result_must_answer_the_plan():
    bench = Bench()
    bench.submit(ask("r", [1]))
    plan = bench.scheduler.plan()
    with pytest.raises(StateError):
        bench.scheduler.apply(StepResult(step=plan.step + 1))
    with pytest.raises(StateError):
        bench.scheduler.apply(StepResult(step=plan.step))


def test_plans_and_results_cross_a_process():
    bench = Bench(eos_ids=(1,))
    bench.submit(ask("r", range(9), 3, min_tokens=2, prompt_logprobs=1, logit_bias={3: 1.5}, repetition_penalty=1.2))
    plan = bench.scheduler.plan()
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(plan), type=StepPlan) == plan
    result = bench.runner.execute(plan)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(result), type=StepResult) == result


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    caching=st.booleans(),
    chunked=st.sampled_from([True, True, False]),
    policy=st.sampled_from(["fcfs", "priority"]),
)
def test_any_sequence_of_operations_keeps_every_text_and_every_block(seed, caching, chunked, policy):
    rng = random.Random(seed)
    now = [0.0]
    bench = Bench(
        num_blocks=rng.randint(8, 24),
        block_size=rng.choice([1, 2, 4]),
        max_model_len=32,
        caching=caching,
        max_num_seqs=rng.randint(1, 6),
        budget=rng.randint(6, 24) if chunked else 32,
        chunked=chunked,
        policy=policy,
        clock=lambda: now[0],
        eos_ids=(0,),
    )
    requests = {}
    for _ in range(60):
        verb = rng.random()
        if verb < 0.35:
            shared = [1, 2, 3, 4, 5, 6, 7, 8, 9][: rng.randint(1, 9)]
            prompt = (*shared, *(rng.randrange(3) for _ in range(rng.randint(0, 4))))
            deadline = now[0] + rng.randint(1, 30) if rng.random() < 0.2 else None
            request = ask(
                f"r{len(requests)}", prompt, rng.randint(1, 12), priority=rng.randint(0, 2), deadline=deadline
            )
            try:
                bench.submit(request)
            except CapacityError:
                continue
            requests[request.id] = request
        elif verb < 0.45 and requests:
            bench.scheduler.abort(rng.choice(list(requests)))
        elif verb < 0.47:
            bench.scheduler.preempt_all()
        elif bench.scheduler.has_work:
            bench.step()
            now[0] += 1.0
        bench.scheduler.check_integrity()
    bench.drain()
    for name, request in requests.items():
        text = expected(request.prompt_ids, request.params.max_tokens)
        text = text[: text.index(0) + 1] if 0 in text else text
        got = bench.tokens(name)
        assert got == text[: len(got)]
        if bench.finish(name) in (State.STOP, State.LENGTH):
            assert got == text
