"""The scheduler under a fake runner: order, budget, preemption, sharing, ends; and any sequence of operations."""

import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.fake_runner import VOCAB, Bench, expected
from twofold.core import CapacityError, RequestError, StateError
from twofold.engine.plan import ChunkResult, StepPlan, StepResult
from twofold.engine.request import Request, State, TokenOut
from twofold.engine.sampling import SamplingParams


def ask(name, prompt, max_tokens=5, *, priority=0, deadline=None, salt="", output=(), **params):
    return Request(
        id=name,
        prompt_ids=tuple(prompt),
        params=SamplingParams(max_tokens=max_tokens, **params),
        priority=priority,
        deadline=deadline,
        salt=salt,
        output_ids=list(output),
    )


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


def test_ends_come_in_order():
    prompt = (1, 2, 3)
    text = expected(prompt, 6)
    eos, stop = text[1], text[3]
    cases = [
        ({}, State.STOP, None, 2),
        ({"ignore_eos": True}, State.LENGTH, None, 6),
        ({"ignore_eos": True, "stop_token_ids": (stop,)}, State.STOP, stop, 4),
        ({"stop_token_ids": (eos,)}, State.STOP, None, 2),
        ({"min_tokens": 3, "stop_token_ids": (stop,)}, State.STOP, stop, 4),
        ({"max_tokens": 2}, State.STOP, None, 2),
        ({"max_tokens": 1}, State.LENGTH, None, 1),
    ]
    for params, state, reason, count in cases:
        bench = Bench(eos_ids=(eos,))
        bench.submit(ask("r", prompt, **({"max_tokens": 6} | params)))
        bench.drain()
        last = bench.outputs["r"][-1]
        assert (bench.finish("r"), last.stop_reason, len(bench.tokens("r"))) == (state, reason, count), params


def test_min_tokens_bans_the_ends_until_it_is_reached():
    bench = Bench(eos_ids=(5,))
    bench.submit(ask("r", [1, 2], 4, min_tokens=2, stop_token_ids=(6, 7)))
    bans = [bench.step().chunks[0].draw.banned for _ in range(4)]
    assert bans == [(5, 6, 7), (5, 6, 7), (), ()]


def test_the_context_is_the_limit_when_none_is_given():
    bench = Bench(max_model_len=20)
    bench.submit(ask("r", range(8), None))
    bench.drain()
    assert len(bench.tokens("r")) == 12 and bench.finish("r") is State.LENGTH


def test_deadlines_end_waiting_and_running_requests():
    now = [0.0]
    bench = Bench(max_num_seqs=1, clock=lambda: now[0])
    bench.submit(ask("running", [1], 100, deadline=10.0))
    bench.submit(ask("waiting", [2], 100, deadline=5.0))
    bench.step()
    now[0] = 6.0
    bench.step()
    assert bench.finish("waiting") is State.TIMEOUT
    now[0] = 11.0
    bench.scheduler.expire()
    bench.collect()
    assert bench.finish("running") is State.TIMEOUT
    assert not bench.scheduler.has_work and bench.pool.used == 0


def test_abort_at_any_moment_is_idempotent():
    bench = Bench()
    bench.scheduler.abort("nobody")
    bench.submit(ask("r", range(9), 50))
    plan = bench.scheduler.plan()
    result = bench.runner.execute(plan)
    bench.scheduler.abort("r")
    bench.scheduler.abort("r")
    bench.submit(ask("r", range(3), 2))  # the id is free again, the old result must not reach the new request
    bench.scheduler.apply(result)
    bench.collect()
    assert [output.finish for output in bench.outputs["r"]] == [State.ABORT]
    bench.outputs.clear()
    bench.drain()
    assert bench.tokens("r") == expected((0, 1, 2), 2)


def test_a_failed_row_ends_alone():
    bench = Bench()
    bench.submit(ask("bad", [1] * 5, 4))
    bench.submit(ask("good", [2] * 5, 4))
    plan = bench.scheduler.plan()
    result = bench.runner.execute(plan)
    rows = (ChunkResult(serial=result.rows[0].serial, error="not finite"), *result.rows[1:])
    bench.scheduler.apply(StepResult(step=plan.step, rows=rows))
    bench.drain()
    assert bench.finish("bad") is State.ERROR and bench.outputs["bad"][-1].error == "not finite"
    assert bench.tokens("good") == expected((2,) * 5, 4)


def test_a_resumed_request_goes_on_or_ends_at_once():
    text = expected((3, 4, 5), 8)
    bench = Bench(eos_ids=(text[5],))
    resumed = bench.submit(ask("on", (3, 4, 5), 8, output=text[:3]))
    bench.submit(ask("over", (3, 4, 5), 8, output=text[:6]))
    bench.submit(ask("full", (3, 4, 5), 4, output=text[:4]))
    bench.drain()
    assert bench.tokens("on") == text[3:6] and resumed.output_ids == text[:6]
    assert bench.tokens("over") == [] and bench.finish("over") is State.STOP
    assert bench.tokens("full") == [] and bench.finish("full") is State.LENGTH


def test_prompt_scores_come_once_and_do_not_read_the_cache():
    bench = Bench(budget=8, num_blocks=30)
    prompt = tuple(range(21))
    bench.submit(ask("warm", prompt, 1))
    bench.drain()
    scored = bench.submit(ask("scored", prompt, 4, prompt_logprobs=2))
    bench.drain()
    prompts = [output.prompt for output in bench.outputs["scored"] if output.prompt is not None]
    assert len(prompts) == 1 and prompts[0][0] == TokenOut(0) and [t.id for t in prompts[0]] == list(prompt)
    assert scored.num_cached == 0


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


@pytest.mark.parametrize(
    ("request_", "error", "says"),
    [
        ({"prompt": ()}, RequestError, "no tokens"),
        ({"prompt": [1] * 200}, RequestError, "at most 199"),
        ({"prompt": [VOCAB]}, RequestError, "0 to 96"),
        ({"prompt": [1], "stop_token_ids": (VOCAB,)}, RequestError, "stop_token_ids"),
        ({"prompt": [1], "allowed_token_ids": (1, 400)}, RequestError, "allowed_token_ids"),
        ({"prompt": [1], "logit_bias": {400: 1.0}}, RequestError, "logit_bias"),
        ({"prompt": [1] * 30, "max_tokens": 100}, CapacityError, "lower max_tokens to 35"),
        ({"prompt": [1] * 65}, CapacityError, "at most 64 tokens"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(request_, error, says):
    bench = Bench(num_blocks=16, block_size=4)
    with pytest.raises(error, match=says):
        bench.submit(ask("r", **request_))
    assert not bench.scheduler.has_work


def test_an_id_is_taken_once():
    bench = Bench()
    bench.submit(ask("r", [1]))
    with pytest.raises(RequestError, match="already"):
        bench.submit(ask("r", [2]))


def test_a_request_that_just_fits_gets_done():
    bench = Bench(num_blocks=4, block_size=4, max_model_len=100)
    bench.submit(ask("r", [1] * 8, 9))
    bench.drain()
    assert len(bench.tokens("r")) == 9


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


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), caching=st.booleans(), policy=st.sampled_from(["fcfs", "priority"]))
def test_any_sequence_of_operations_keeps_every_text_and_every_block(seed, caching, policy):
    rng = random.Random(seed)
    now = [0.0]
    bench = Bench(
        num_blocks=rng.randint(8, 24),
        block_size=rng.choice([1, 2, 4]),
        max_model_len=32,
        caching=caching,
        max_num_seqs=rng.randint(1, 6),
        budget=rng.randint(6, 24),
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
